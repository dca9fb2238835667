"""Read a data file of any known shape into records. All faults of a file are told, each with its record and its fix.

JSON, JSON lines, parquet, what plugins read, and folders saved by Hugging Face `datasets`; a LLaMA-Factory
`dataset_info.json` beside the file names its columns. A file is read record by record and never held as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

from mllm_keeplora.data.formats import Draft, Fault, question_draft, test_draft, train_draft
from mllm_keeplora.data.layout import Layout
from mllm_keeplora.data.store import VERSION, Records, open_rows, rows_of, write_rows
from mllm_keeplora.errors import UserError, several
from mllm_keeplora.system import files
from mllm_keeplora.system.log import log
from mllm_keeplora.system.plugins import ENTERED, version_of

INFO = "dataset_info.json"
CHUNK = 1 << 16  # characters of a JSON array read at once
PART = 1 << 20  # bytes digested at once
PARQUET = ".parquet"
SMALL = 1 << 24  # bytes; smaller JSON files are read into memory as they are
SHOWN = 20


def read_train(path: Path, images: Path, pad: bool = False) -> Records:
    """Training records of a data file. Images themselves are not looked at.

    Args:
        path: a file, or a folder saved by `datasets`.
        images: folder that image paths are relative to.
        pad: pictures are to be padded to squares.

    Raises:
        UserError: every fault of the file at once, each with record index and what is wrong.
    """
    return Records(_stored(path, train_draft), path, images, pad)


def read_test(path: Path, images: Path, pad: bool = False, needs_answers: bool = True) -> Records:
    """Graded records: a question each, with its gold answer if `needs_answers`; identifiers are unique in the file."""
    return Records(_stored(path, test_draft if needs_answers else question_draft), path, images, pad)


def digest(path: Path) -> str:
    """SHA-256 of a data file, kept in the run so that changed data is noticed; of a folder's files the two ends."""
    if path.is_dir():
        total = hashlib.sha256()
        for each in sorted(each for each in path.rglob("*") if each.is_file()):
            files.digest_ends(total, each, str(each.relative_to(path)))
        return total.hexdigest()
    stat = path.stat()
    return (_digest if stat.st_size < SMALL else _kept_digest)(path, stat.st_mtime_ns, stat.st_size)


def _digest(path: Path, *_: int) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as handle:
        while part := handle.read(PART):
            total.update(part)
    return total.hexdigest()


_kept_digest = lru_cache(1024)(_digest)  # of large files, as long as neither time nor size changes


def _stored(path: Path, parse: Callable[[Any, Layout], Draft]) -> Sequence[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"data file {path} does not exist")
    layout = _layout(path)
    if path.is_file() and path.suffix != PARQUET and path.stat().st_size < SMALL:
        return rows_of(_drafts(path, layout, parse))
    told = [digest(path), parse.__name__, VERSION, layout.formatting, layout.columns, layout.tags]
    if (reader := ENTERED.get(("READERS", path.suffix))) is not None:
        told.append(version_of(reader))
    texts = (f"{path.resolve()} {parse.__name__}", json.dumps(told))
    names = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
    arrow = files.cache_folder() / "records" / f"{'-'.join(name[:16] for name in names)}.arrow"
    if not arrow.is_file():
        log.info("reading %s once; its records are kept in %s", path, arrow.parent)
        write_rows(arrow, _drafts(path, layout, parse))
        for older in arrow.parent.glob(f"{arrow.name.split('-')[0]}-*.arrow"):
            if older != arrow:
                older.unlink(missing_ok=True)
    return open_rows(arrow)


def _drafts(path: Path, layout: Layout, parse: Callable[[Any, Layout], Draft]) -> Iterator[Draft]:
    """Every record understood; at the end one error with every fault, if there was any."""
    faults, more, count = [], 0, 0
    seen: set[str] = set()
    for index, row in enumerate(_rows(path)):
        count += 1
        try:
            draft = parse(row, layout)
            draft = draft if draft.id else replace(draft, id=str(index))
            if parse is not train_draft and draft.id in seen:
                raise Fault(f"question_id {draft.id!r} occurs twice")
            seen |= set() if parse is train_draft else {draft.id}
        except Fault as fault:
            if len(faults) < SHOWN:
                hint = f"; {layout.told}" if layout.told and str(fault).startswith("unknown shape") else ""
                faults.append(f"{path} record {index}: {fault}{hint}")
            else:
                more += 1
            continue
        if not faults:
            yield draft
    if not count:
        raise UserError(f"data file {path} is empty: it holds no record")
    if faults:
        raise several(faults, SHOWN, more)


def _rows(path: Path) -> Iterable[Any]:
    if path.is_dir():
        return _saved_rows(path)
    return READERS.get(path.suffix, _json_rows)(path)


def _saved_rows(path: Path) -> Iterator[dict]:
    from datasets import Image, List, load_from_disk

    try:
        table = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"data folder {path} was not saved by `datasets`: {error}") from None
    if not hasattr(table, "column_names") or isinstance(table.column_names, dict):
        raise UserError(f"data folder {path} holds several splits: name one of {', '.join(table)} as a folder below it")
    for name, feature in table.features.items():  # encoded pictures stay as they are
        if isinstance(feature, Image):
            table = table.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            table = table.cast_column(name, List(Image(decode=False)))
    yield from table


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data file {path} is not readable parquet: {error}") from None


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        with open(path, encoding="utf-8-sig") as handle:
            start = handle.read(1)
            while start.isspace():
                start = handle.read(1)
            if start == "[":
                yield from _array_rows(handle)
            elif start:
                handle.seek(0)
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        yield _line(line, number)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        why = getattr(error, "msg", error)
        raise UserError(f"data file {path} is neither one JSON array nor one JSON object a line: {why}") from None


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {  # ending of a file -> its rows, one after the other
    ".json": _json_rows,
    ".jsonl": _json_rows,
    PARQUET: _parquet_rows,
}


def _line(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"line {number}: {error.msg}", line, error.pos) from None


def _array_rows(handle: TextIO) -> Iterator[Any]:
    """Values of a JSON array whose opening bracket has been read, without holding more than one and a chunk.

    Raises:
        JSONDecodeError: the file ends too early, or something else than a value, a comma or the end stands there.
    """
    decoder, text, is_first, number = json.JSONDecoder(), "", True, 0
    while True:
        text = text.lstrip()
        if text.startswith("]"):
            rest = text[1:] + handle.read()
            if rest.strip():
                raise json.JSONDecodeError("something stands behind the end of the array", rest[:40], 0)
            return
        if text and not is_first and not text.startswith(","):
            raise json.JSONDecodeError(f"expected a comma before record {number}", text[:40], 0)
        body = text if is_first else text[1:].lstrip()
        why = "the file ends before the array does"
        try:
            value, stop = decoder.raw_decode(body)
            is_whole = stop < len(body)  # else a number may go on
        except json.JSONDecodeError as error:
            is_whole, why = False, error.msg if body else why
        if not is_whole:
            more = handle.read(max(CHUNK, len(text)))
            if not more:
                raise json.JSONDecodeError(f"record {number}: {why}", body[:40], 0)
            text += more
            continue
        yield value
        text, is_first, number = body[stop:], False, number + 1


def _layout(path: Path) -> Layout:
    """What a LLaMA-Factory `dataset_info.json` beside the file says about it."""
    info = next((folder / INFO for folder in (path.parent, path.parent.parent) if (folder / INFO).is_file()), None)
    if info is None or path.is_dir():
        return Layout()
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{info} is not readable JSON: {error}") from None
    entries = entries.values() if isinstance(entries, dict) else []
    named = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)]
    found = [entry for entry in named if (info.parent / entry["file_name"]).resolve() == path.resolve()]
    if not found:
        return Layout(told=f"{info} has no entry for {path.name}")
    entry = found[0]
    if any(other != entry for other in found):
        raise UserError(f"{info}: {len(found)} entries of different content name {path.name}; leave one")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt"):
        raise UserError(f"{info}: formatting of {path.name} must be alpaca or sharegpt, got {formatting!r}")
    told = f"its columns are as {info} names them"
    return Layout(formatting, entry.get("columns") or {}, entry.get("tags") or {}, told)
