"""Logging for a run: the main process writes to the terminal and to the run's log.txt; the others stay silent."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress
from pathlib import Path

from mllm_keeplora.system import distributed, files

log = logging.getLogger("mllm_keeplora")


class LogFile(logging.FileHandler):
    """A log that cannot be written ends the run, as any other file; Python's own would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        log.removeHandler(self)
        with suppress(OSError):  # what could not be written
            self.close()
        error = sys.exc_info()[1]
        refused = files.unwritable(error, Path(self.baseFilename)) if isinstance(error, Exception) else None
        if refused is None:
            super().handleError(record)
            return
        raise refused from error


def start_logging(run_log: Path | None = None, level: int = logging.INFO) -> None:
    """Send the package's log to the terminal and, in the main process, to `run_log`; replaces earlier targets."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        with suppress(OSError):  # what a full disk did not take
            handler.close()
    log.propagate = False
    log.setLevel(level if distributed.is_main() else logging.ERROR)
    if distributed.is_main():
        from rich.logging import RichHandler

        from mllm_keeplora.system.progress import console

        log.addHandler(RichHandler(console=console(), show_path=False, show_level=False, log_time_format="[%X]"))
        if run_log is not None:
            with files.written(run_log):
                to_file = LogFile(run_log, encoding="utf-8")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            log.addHandler(to_file)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy in ("transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
