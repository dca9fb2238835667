"""Memory that training records take, over a growing number of them. It should stay flat.

    python scripts/bench_records.py                    100 thousand, then a million records (minutes, 1 GB of disk)
    python scripts/bench_records.py 20000 200000       other counts

Every count is written, read, and walked through in a process of its own. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", nargs="*", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        print(json.dumps(_walk(options.read)))
        return
    lines = []
    for count in options.counts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "train.json"
            _write(path, count)
            environment = {**os.environ, "MLLM_KEEPLORA_CACHE": folder}
            command = [sys.executable, __file__, "--read", str(path)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            lines.append({"records": count, "file_bytes": path.stat().st_size, **json.loads(done.stdout)})
            print(json.dumps(lines[-1]), file=sys.stderr, flush=True)
    print(json.dumps(lines))


def _write(path: Path, count: int) -> None:
    with open(path, "w", encoding="utf-8") as handle:
        for number in range(count):
            turns = [
                {"from": "human", "value": f"<image>\nWhat does picture {number} of the series show, in a few words?"},
                {"from": "gpt", "value": f"A drawn scene with {number % 17} objects, the largest of them on the left."},
            ]
            row = {"id": str(number), "image": f"images/{number}.png", "conversations": turns}
            handle.write(("[" if number == 0 else ",") + json.dumps(row))
        handle.write("]")


def _walk(path: Path) -> dict[str, float]:
    """Read the file and look at every record, as passes over the data do; memory before, between and after."""
    from mllm_keeplora.data import readers

    readers.SMALL = 0  # the counts of a benchmark may be small; what is measured is how large files are read
    import datasets  # noqa: F401  (its import is not what is measured)

    before = _held_bytes()
    records = readers.read_train(path, path.parent)
    read = _held_bytes()
    assert all(record.question for record in records)
    assert all(records[number].question for number in range(0, len(records), 7))
    return {"before_mb": before / 1e6, "after_reading_mb": read / 1e6, "after_walking_mb": _held_bytes() / 1e6}


def _held_bytes() -> int:
    """Memory of the process without mapped files; where the system does not tell them apart, the most it ever held."""
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return 1024 * int(fields["RssAnon"].split()[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
