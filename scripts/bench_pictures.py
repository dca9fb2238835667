"""What the look into pictures costs before a run: at its first start, at the next ones, and their digests alone.

    python scripts/bench_pictures.py                   100 thousand small JPEG files (minutes, 1 GB of disk)
    python scripts/bench_pictures.py 10000 --side 640  fewer and larger ones

`cold`: the files are not in the machine's memory, as far as the system lets go of them. `again`: nothing has changed.
`moved`: all files are known by content alone, as under another path. Prints one JSON object: seconds, files a second,
and the share of the first look's time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from mllm_keeplora.data.media.images import Looks, digests_of
from mllm_keeplora.data.schema import Media, Record
from mllm_keeplora.system.known import Known

DRAWN = 50  # pictures that are drawn; the others are these with bytes behind their end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=100_000)
    parser.add_argument("--side", type=int, default=224, help="of a picture, in pixels")
    parser.add_argument("--folder", type=Path, help="where to write; default: the folder of temporary files")
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ["MLLM_KEEPLORA_CACHE"] = f"{folder}/cache"
        records = _write(Path(folder) / "pictures", options.count, options.side)
        paths = [record.media[0].path for record in records]
        time.sleep(3)  # what has just been written is not taken for settled

        def measure(name: str, work: Callable[[], None], is_cold: bool = False) -> None:
            if is_cold:
                _let_go(paths)
            began = time.monotonic()
            work()
            seconds = time.monotonic() - began
            share = seconds / found["first, cold"]["seconds"] if found else 1.0
            found[name] = {"seconds": round(seconds, 2), "per_s": round(len(paths) / seconds), "share": round(share, 4)}
            print(name, json.dumps(found[name]), file=sys.stderr, flush=True)

        def look() -> None:
            with Known.of_user() as known:
                assert not list(Looks(known).faults(records))

        measure("first, cold", look, is_cold=True)
        measure("again", look)
        measure("digests again", lambda: digests_of(records))
        kept = (Path(folder) / "cache" / "known.sqlite").stat().st_size
        for path in paths:
            os.utime(path)
        measure("moved, cold", look, is_cold=True)
        shutil.rmtree(f"{folder}/cache")
        measure("digests, cold", lambda: digests_of(records), is_cold=True)
        shutil.rmtree(f"{folder}/cache")
        measure("digests, warm", lambda: digests_of(records))
        size = sum(path.stat().st_size for path in paths)
    print(json.dumps({"files": options.count, "bytes": size, "cache_bytes": kept, **found}))


def _write(folder: Path, count: int, side: int) -> list[Record]:
    folder.mkdir()
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWN):
        small = random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((side, side)).save(buffer, "JPEG")
        drawn.append(buffer.getvalue())
    records = []
    for number in range(count):
        path = folder / f"{number // 1000:03d}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(drawn[number % DRAWN] + str(number).encode())
        records.append(Record(str(number), (Media("image", path, folder),), (), origin=path.name))
    os.sync()
    return records


def _let_go(paths: list[Path]) -> None:
    """Ask the system to drop the files from its memory."""
    for path in paths:
        with open(path, "rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
