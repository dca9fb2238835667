"""Logging for a run: the main process writes to the terminal and to the run's log.txt; the others stay silent."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from mllm_keeplora.system import distributed

log = logging.getLogger("mllm_keeplora")


def start_logging(run_log: Path | None = None, level: int = logging.INFO) -> None:
    """Send the package's log to the terminal and, in the main process, to `run_log`; replaces earlier targets."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.propagate = False
    log.setLevel(level if distributed.is_main() else logging.ERROR)
    if distributed.is_main():
        from rich.logging import RichHandler

        from mllm_keeplora.system.progress import console

        log.addHandler(RichHandler(console=console(), show_path=False, show_level=False, log_time_format="[%X]"))
        if run_log is not None:
            to_file = logging.FileHandler(run_log, encoding="utf-8")
            to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            log.addHandler(to_file)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for noisy in ("transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
