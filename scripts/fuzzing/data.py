"""Files of records of every form, and pictures of every format."""

from __future__ import annotations

import io
import json
from pathlib import Path

from fuzzing.samples import Target, encoded, llava_rows, test_rows

PICTURES = {
    "png": ("PNG", {}), "jpg": ("JPEG", {}), "webp": ("WEBP", {}), "gif": ("GIF", {}), "bmp": ("BMP", {}),
    "tiff": ("TIFF", {}), "ppm": ("PPM", {}), "jp2": ("JPEG2000", {}), "avif": ("AVIF", {}), "mpo": ("MPO", {}),
}  # fmt: skip
CLIPS = {
    "mp4": ("mpeg4", "yuv420p"), "mov": ("libx264", "yuv420p"), "mkv": ("ffv1", "bgr0"),
    "webm": ("libvpx-vp9", "yuv420p"), "avi": ("mjpeg", "yuvj420p"), "gif": ("gif", "rgb8"),
}  # fmt: skip
OTHERS = {"ico": "ICO", "tga": "TGA", "eps": "EPS", "pcx": "PCX", "icns": "ICNS", "dds": "DDS"}  # Pillow writes them


def records_of(home: Path, data: Path) -> list[Target]:
    import pyarrow
    from pyarrow import parquet

    from mllm_keeplora.data.media.images import images_of
    from mllm_keeplora.data.readers import digest, read_test, read_train

    def train(path: Path) -> None:
        for record in read_train(path, data):
            images_of(record)
            f"{record.question_answers()}".encode()

    def test(path: Path) -> None:
        for record in read_test(path, data):
            images_of(record)
            f"{record.question}{record.answer}{record.kind}{record.id}".encode()

    def info(path: Path) -> None:
        train(path.with_name("named.jsonl"))

    def folder(path: Path) -> None:
        digest(path.parent)
        train(path.parent)

    lines = b"".join(json.dumps(row).encode() + b"\n" for row in llava_rows())
    shared = {"messages": [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red"}]}
    shared |= {"images": ["images/a.png"], "system": "Be brief.", "options": ["Which"]}
    alpaca = {
        "instruction": "<image>Which?",
        "input": "",
        "output": "red",
        "images": ["images/a.png"],
        "history": [["a", "b"]],
    }
    own = {"talk": [{"who": "me", "said": "<image>?"}, {"who": "it", "said": "red"}], "shown": ["images/a.png"]}
    tags = {"role_tag": "who", "content_tag": "said", "user_tag": "me", "assistant_tag": "it"}
    entry = {
        "file_name": "named.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "talk", "images": "shown"},
        "tags": tags,
    }
    (home / "named").mkdir()
    (home / "named" / "named.jsonl").write_text(json.dumps(own) + "\n")
    rows = [
        {"question": "<image>Which?", "answer": "red", "image": {"bytes": encoded(), "path": "a.png"}, "n": n}
        for n in range(3)
    ]
    table = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    saved = home / "saved"
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(saved))
    state, arrow = saved / "state.json", next(saved.glob("*.arrow"))
    references = {"annotations": [{"question_id": name, "answers": [{"answer": "red"}]} for name in "abc"]}

    def referenced(path: Path) -> None:
        from mllm_keeplora.data.references import with_references

        with_references(read_test(data / "Lamps_test.json", data), path)

    return [
        Target("LLaVA json", "json", home / "llava.json", json.dumps(llava_rows()).encode(), train),
        Target("test json", "json", home / "test.json", json.dumps(test_rows()).encode(), test),
        Target("jsonl", "lines", home / "llava.jsonl", lines, train),
        Target("sharegpt jsonl", "lines", home / "sharegpt.jsonl", json.dumps(shared).encode() + b"\n", train),
        Target("alpaca json", "json", home / "alpaca.json", json.dumps([alpaca]).encode(), train),
        Target("csv", "bytes", home / "table.csv", b"question,answer,image\nWhich?,red,images/a.png\n", test),
        Target("tsv", "bytes", home / "table.tsv", b"question\tanswer\timage\nWhich?\tred\timages/a.png\n", test),
        Target("parquet", "bytes", home / "table.parquet", table.getvalue(), train),
        Target("dataset_info.json", "json", home / "named/dataset_info.json", json.dumps({"a": entry}).encode(), info),
        Target("saved folder, state", "json", state, state.read_bytes(), folder),
        Target("saved folder, arrow", "bytes", arrow, arrow.read_bytes(), folder),
        Target("references", "json", home / "references.json", json.dumps(references).encode(), referenced),
    ]


def pictures_of(home: Path) -> list[Target]:
    from PIL import Image

    from mllm_keeplora.data.media.images import Looks, image_size, read_image
    from mllm_keeplora.data.schema import Media, Record, Turn

    def read(path: Path) -> None:
        media = Media("image", path, path.parent)
        for fault in Looks().faults([Record("r", (media,), (Turn("user", "?"),), origin="r")]):
            from mllm_keeplora.errors import UserError

            raise UserError(fault)
        image_size(media)
        read_image(media)

    found = []
    for ending, (form, options) in PICTURES.items():
        valid = encoded(form=form, **options)
        if form == "TIFF":
            buffer = io.BytesIO()
            deep = Image.radial_gradient("L").resize((12, 8)).convert("I;16")
            deep.save(buffer, form, compression="tiff_lzw")
            found.append(Target("picture tiff16", "picture", home / "p/deep.tiff", buffer.getvalue(), read))
        found.append(Target(f"picture {ending}", "picture", home / f"p/picture.{ending}", valid, read))
    clear = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (9, 7), (9, 9, 9, 99)).save(clear, "PNG", exif=exif)
    found.append(Target("picture clear", "picture", home / "p/clear.png", clear.getvalue(), read))
    others = b"".join(encoded((16, 16), form) for form in ("ICO",))
    found.append(Target("picture other", "picture", home / "p/other.png", others, read))
    for ending, form in OTHERS.items():
        found.append(Target("picture other", "bytes", home / f"p/other.{ending}", encoded((32, 32), form), read))
    return found


def clips_of(home: Path) -> list[Target]:
    """Clips of every container, each with the frames that are seen of it."""
    from mllm_keeplora.data.media.sampling import VideoOptions
    from mllm_keeplora.data.media.video import is_irregular, read_clip
    from mllm_keeplora.data.schema import Media

    def read(path: Path) -> None:
        media = Media("video", path, path.parent, video=VideoOptions(frames=4))
        clip = read_clip(media)
        is_irregular(media)
        if clip.frames.shape != (4, 32, 48, 3):  # a header may say so; never fewer frames
            assert len(clip.frames) == 4, clip.frames.shape

    return [
        Target(f"clip {ending}", "bytes", home / f"p/clip.{ending}", _clip(home / f"sample.{ending}", *how), read)
        for ending, how in CLIPS.items()
    ]


def _clip(path: Path, codec: str, pixels: str) -> bytes:
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, pixels
        for number in range(12):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 20 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format=pixels)))
        container.mux(stream.encode())
    return path.read_bytes()
