"""Read a data file of any known shape into records. All faults of a file are told, each with its record and its fix.

JSON, JSON lines, parquet, what plugins read, and folders saved by Hugging Face `datasets`; a LLaMA-Factory
`dataset_info.json` beside the file names its columns. A file is read record by record and never held as a whole.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TextIO

from pydantic import BaseModel, ValidationError

from mllm_keeplora.data.formats import Fault, Layout, question_record, test_record, train_record, unwritable_text
from mllm_keeplora.data.layouts import published_digest, published_rows
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.data.naming import Naming
from mllm_keeplora.data.schema import Record
from mllm_keeplora.data.store import VERSION, Source, StoredRecords, write_records
from mllm_keeplora.errors import UserError, first_line, several, shortened, validation_faults
from mllm_keeplora.system import files, given
from mllm_keeplora.system.known import Known, digest_file
from mllm_keeplora.system.log import log
from mllm_keeplora.system.plugins import ENTERED, version_of

INFO = "dataset_info.json"
CHUNK = 1 << 16  # characters of a JSON file read at once
PARQUET = ".parquet"
SMALL = 1 << 24  # bytes; smaller JSON files are read into memory as they are
MOST_ROWS = 256  # of a table that are read at once
MOST_TABLE = 1 << 28  # bytes of these, unless a single row has more
SHOWN = 20
ALL_DEFAULT = VideoOptions()
MOST_TOLD = 1000  # characters of a fault


def read_train(
    path: Path,
    images: Path,
    pad: bool = False,
    missing_marks: str = "refuse",
    naming: Naming | None = None,
    video: VideoOptions = ALL_DEFAULT,
) -> Sequence[Record]:
    """Read the training records of a data file. Images themselves are not looked at.

    Args:
        path: a file, or a folder saved by `datasets`.
        images: folder that image paths are relative to.
        pad: pictures are to be padded to squares.
        missing_marks: `first` puts the pictures of records without any mark before their first question.
        naming: where rows are pictures and their classes.
        video: how frames of clips are chosen.

    Raises:
        UserError: every fault of the file at once, each with record index and what is wrong.
    """
    return _records(Source(path, images, pad, naming and naming.classes, video), train_record, missing_marks, naming)


def read_test(
    path: Path,
    images: Path,
    pad: bool = False,
    needs_answers: bool = True,
    naming: Naming | None = None,
    video: VideoOptions = ALL_DEFAULT,
) -> Sequence[Record]:
    """Read graded records: a question each, with its gold answer if `needs_answers`; identifiers must be unique."""
    source = Source(path, images, pad, naming and naming.classes, video)
    return _records(source, test_record if needs_answers else question_record, naming=naming)


def read_published(
    layout: str, path: Path, images: Path, split: str, naming: Naming, pad: bool = False, graded: bool = False
) -> Sequence[Record]:
    """Read a split of a published data set, which is parsed once and kept, whatever its size.

    Args:
        layout: one of `data.layouts`.
        path, images: its folder or file, and the folder that pictures are named in.
        split: train, validation or test.
        naming: of its classes.
        pad: pictures are to be padded to squares.
        graded: as records of a test.

    Raises:
        UserError: it cannot be read, or every record that is at fault.
    """
    parse = test_record if graded else train_record
    told = [published_digest(layout, path, split), parse.__name__, VERSION, naming.digest]
    who = f"{path.resolve()} {layout} {split} {parse.__name__}"
    rows = _understood(path, published_rows(layout, path, split), Layout(naming=naming), parse)
    return _kept(Source(path, images, pad, naming.classes), who, told, rows)


def digest(path: Path) -> str:
    """Digest a data file (SHA-256), so that changed data is noticed; of a folder's files the two ends are read."""
    if path.is_dir():
        total = hashlib.sha256()
        for each in sorted(each for each in path.rglob("*") if each.is_file()):
            files.digest_ends(total, each, str(each.relative_to(path)))
        return total.hexdigest()
    given.opened(path).close()  # a pipe or a device would be read for ever
    with Known.of_user() as known:
        return digest_file(path, known)


def _records(
    source: Source,
    parse: Callable[[Any, Layout], Record],
    missing_marks: str = "refuse",
    naming: Naming | None = None,
) -> Sequence[Record]:
    """Read a small file into memory; a large one is parsed once into an Arrow file, which later reads map."""
    path = source.path
    if not path.is_dir():
        if not path.exists():
            raise UserError(f"data file {path} does not exist")
        given.opened(path).close()
    layout = replace(_layout(path), missing_marks=missing_marks, naming=naming)
    rows = _saved_rows(path) if path.is_dir() else READERS.get(path.suffix, _json_rows)(path)
    understood = _understood(path, rows, layout, parse)
    if path.is_file() and path.suffix != PARQUET and path.stat().st_size < SMALL:
        found = enumerate(understood)
        return [source.placed(record, index, [media.data for media in record.media]) for index, record in found]
    # The file's name says what the records depend on, so that other content or rules are read anew.
    told = [digest(path), parse.__name__, VERSION, missing_marks, layout.formatting, layout.columns, layout.tags]
    if (reader := ENTERED.get(("READERS", path.suffix))) is not None:
        told.append(version_of(reader))
    if naming is not None:
        told.append(naming.digest)
    return _kept(source, f"{path.resolve()} {parse.__name__}", told, understood)


def _kept(source: Source, who: str, told: list[Any], records: Iterable[Record]) -> StoredRecords:
    """Map the records of a source from an Arrow file, which is written if there is none with the same facts.

    Args:
        source: of the records.
        who: what replaces what in the cache: of the same, other facts are forgotten.
        told: what the records depend on.
        records: taken only if they are to be written.
    """
    texts = (who, json.dumps(told))
    names = (hashlib.sha256(text.encode()).hexdigest() for text in texts)
    arrow = files.cache_folder() / "records" / f"{'-'.join(name[:16] for name in names)}.arrow"
    if not arrow.is_file():
        log.info("reading %s once; its records are kept in %s", source.path, arrow.parent)
        write_records(arrow, records)
        for older in arrow.parent.glob(f"{arrow.name.split('-')[0]}-*.arrow"):
            if older != arrow:
                older.unlink(missing_ok=True)
    return StoredRecords(arrow, source)


def _understood(
    path: Path, rows: Iterable[Any], layout: Layout, parse: Callable[[Any, Layout], Record]
) -> Iterator[Record]:
    """Yield every record that is understood; at the end one error with every fault, if there was any."""
    faults, more, index = [], 0, None
    seen: set[str] = set()
    for index, row in enumerate(rows):
        try:
            record = _parsed(parse, row, layout)
            record = record if record.id else replace(record, id=str(index))
            if parse is not train_record:
                if record.id in seen:
                    raise Fault(f"question_id {record.id!r} occurs twice")
                seen.add(record.id)
        except Fault as fault:
            if len(faults) < SHOWN:
                hint = f"; {layout.told}" if layout.told and str(fault).startswith("unknown shape") else ""
                faults.append(f"{path} record {index}: {shortened(fault, MOST_TOLD)}{hint}")
            else:
                more += 1
            continue
        if not faults:
            yield record
    if index is None:
        raise UserError(f"data file {path} is empty: it holds no record")
    if faults:
        raise several(faults, SHOWN, more)


def _parsed(parse: Callable[[Any, Layout], Record], row: Any, layout: Layout) -> Record:
    try:
        record = parse(row, layout)
    except (TypeError, KeyError, AttributeError, IndexError, RecursionError, OverflowError) as error:
        raise Fault(f"a value is of a kind that nobody expected: {type(error).__name__}: {error}") from error
    if unwritable := unwritable_text(record):
        raise Fault(f"half a character, {unwritable!a}, stands in a text; nothing could write it")
    return record


def _saved_rows(path: Path) -> Iterator[dict]:
    from datasets import load_from_disk

    with _readable(f"data folder {path} was not saved by `datasets`"):
        table = load_from_disk(str(path))
        if not hasattr(table, "column_names") or isinstance(table.column_names, dict):
            names = ", ".join(table)
            raise UserError(f"data folder {path} holds several splits: name one of {names} as a folder below it")
        table.data.validate(full=True)  # offsets that lead out of a mapped file would end the process
        yield from table.to_iterable_dataset().decode(False)  # encoded pictures stay as they are


def _parquet_rows(path: Path) -> Iterator[dict]:
    from pyarrow import parquet

    with _readable(f"data file {path} is not readable parquet"), parquet.ParquetFile(path) as table:
        for number in range(table.num_row_groups):
            # A value may be as large as its whole column, and stand in every row.
            size = max(1, min(MOST_ROWS, MOST_TABLE // max(table.metadata.row_group(number).total_byte_size, 1)))
            for batch in table.iter_batches(batch_size=size, row_groups=[number]):
                yield from batch.to_pylist()


@contextmanager
def _readable(otherwise: str) -> Iterator[None]:
    """Tell in a sentence whatever another library makes of a damaged table."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{otherwise}: {shortened(first_line(error))}") from None


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        with io.TextIOWrapper(given.opened(path), encoding="utf-8-sig") as handle:
            start = ""
            while not start and (part := handle.read(CHUNK)):
                start = part.lstrip()
            if start.startswith("["):
                yield from _array_rows(handle, start[1:])
            elif start:
                handle.seek(0)
                yield from given.json_lines(handle)
    except UserError:
        raise
    except ValueError as error:
        why = given.why(error)
        raise UserError(f"data file {path} is neither one JSON array nor one JSON object a line: {why}") from None


READERS: dict[str, Callable[[Path], Iterable[Any]]] = {  # ending of a file -> its rows, one after the other
    ".json": _json_rows,
    ".jsonl": _json_rows,
    PARQUET: _parquet_rows,
}


def _array_rows(handle: TextIO, text: str) -> Iterator[Any]:
    """Yield the values of a JSON array behind its opening bracket, without holding more than one and a chunk.

    Args:
        handle, text: the file, and what of the array has been read of it.
    """
    decoder, number = json.JSONDecoder(), 0
    while not (text := text.lstrip()).startswith("]"):
        if number and text and not text.startswith(","):
            raise ValueError(f"expected a comma before record {number}")
        body = text[1:].lstrip() if number else text
        why = "the file ends before the array does"
        try:
            value, stop = decoder.raw_decode(body)
        except json.JSONDecodeError as error:
            stop, why = len(body), error.msg if body else why
        except RecursionError:
            raise ValueError(f"record {number}: {given.TOO_DEEP}") from None
        except ValueError as error:  # a number that is too long
            raise ValueError(f"record {number}: {given.why(error)}") from None
        if stop < len(body):
            if given.is_deep(value, body.count("[", 0, stop) + body.count("{", 0, stop)):
                raise ValueError(f"record {number}: {given.TOO_DEEP}")
            yield value
            text, number = body[stop:], number + 1
        elif len(text) > given.MOST_RECORD:
            raise ValueError(f"record {number}: {given.TOO_LONG}")
        elif more := handle.read(max(CHUNK, len(text))):  # the value, a number too, may go on
            text += more
        else:
            raise ValueError(f"record {number}: {why}")
    rest = text[1:]
    while not rest.strip() and (rest := handle.read(CHUNK)):
        pass
    if rest.strip():
        raise ValueError("something stands behind the end of the array")


def _is_same(named: Path, path: Path) -> bool:
    try:
        return named.resolve() == path.resolve()
    except (OSError, ValueError):  # a name that no file can have
        return False


class InfoEntry(BaseModel):
    """What a `dataset_info.json` says of a file, as far as it is read here; LLaMA-Factory gives it more keys."""

    formatting: Literal["alpaca", "sharegpt"] = "alpaca"
    columns: dict[str, str | None] | None = None
    tags: dict[str, str | None] | None = None


def _layout(path: Path) -> Layout:
    """Read what a LLaMA-Factory `dataset_info.json` beside the file says about it."""
    info = next((folder / INFO for folder in (path.parent, path.parent.parent) if (folder / INFO).is_file()), None)
    if info is None or path.is_dir():
        return Layout()
    data = given.read_bytes(info)
    try:
        entries = given.from_json(data)
    except ValueError as error:
        raise UserError(f"{info} is not readable JSON: {error}") from None
    if not isinstance(entries, dict):
        raise UserError(f"{info} must map names of data sets to their files, got {type(entries).__name__}")
    entries = entries.values()
    named = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)]
    found = [entry for entry in named if _is_same(info.parent / entry["file_name"], path)]
    if not found:
        return Layout(told=f"{info} has no entry for {path.name}")
    entry = found[0]
    if any(other != entry for other in found):
        raise UserError(f"{info}: {len(found)} entries of different content name {path.name}; leave one")
    try:
        read = InfoEntry.model_validate(entry)
    except ValidationError as error:
        raise several(validation_faults(error, f"{info}, entry of {path.name}", InfoEntry)) from None
    columns, tags = ({key: name for key, name in (part or {}).items() if name} for part in (read.columns, read.tags))
    return Layout(read.formatting, columns, tags, f"its columns are as {info} names them")
