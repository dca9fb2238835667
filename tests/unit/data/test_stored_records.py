"""Data files of every kind on disk: the same records, large files mapped from Arrow, all faults told."""

import json
import logging
import pickle
import tracemalloc
from io import BytesIO

import pytest
from PIL import Image
from torch.utils.data import ConcatDataset

from mllm_keeplora.data import readers
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.data.media.images import images_of
from mllm_keeplora.data.readers import read_test, read_train
from mllm_keeplora.data.store import Selection
from mllm_keeplora.errors import UserError

SPLIT = 7  # characters read at once, so that records are cut everywhere


def conversation(number):
    turns = [{"role": "user", "content": f'<image>Number {number}, "[,]" ?'}, {"role": "assistant", "content": "yes"}]
    return {"id": str(number), "messages": turns, "images": ["a.png"]}


ROWS = [conversation(number) for number in range(12)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (4, 4), (250, 0, 0)).save(tmp_path / "a.png")
    return tmp_path


@pytest.fixture
def large(monkeypatch):
    """Every file is taken as a large one."""
    monkeypatch.setattr(readers, "SMALL", 0)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def as_json(folder, rows=ROWS):
    return write(folder / "d.json", json.dumps(rows))


def as_pretty_json(folder, rows=ROWS):
    return write(folder / "d.json", "\n " + json.dumps(rows, indent=3) + "\n")


def as_lines(folder, rows=ROWS):
    return write(folder / "d.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")


def as_parquet(folder, rows=ROWS):
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows).to_parquet(folder / "d.parquet")
    return folder / "d.parquet"


def as_saved(folder, rows=ROWS):
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


@pytest.mark.parametrize("kind", [as_json, as_pretty_json, as_lines, as_parquet, as_saved])
def test_every_kind_of_file_gives_the_same_records(kind, folder, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK", SPLIT)
    expected = list(read_train(as_json(folder), folder))
    records = read_train(kind(folder), folder)
    assert len(records) == 12 and list(records) == expected
    assert records[3].question == 'Number 3, "[,]" ?' and records[-1].id == "11"
    assert images_of(records[0])[0].getpixel((0, 0)) == (250, 0, 0)


def test_a_large_file_is_mapped_and_says_the_same(folder, large):
    path = as_json(folder)
    records = read_train(path, folder)
    assert len(list((folder / "cache" / "records").glob("*.arrow"))) == 1
    assert list(records) == [records[number] for number in range(12)]
    assert records[5].origin == f"{path} record 5" and records[5].turns[0].text == 'Number 5, "[,]" ?'


@pytest.mark.parametrize("threshold", [readers.SMALL, 0])
def test_records_and_choices_of_them_go_to_a_data_loaders_workers(threshold, folder, monkeypatch):
    """Also where workers are spawned; of a large file nothing but its name goes there."""
    monkeypatch.setattr(readers, "SMALL", threshold)
    records = read_train(as_json(folder, ROWS * 50), folder)
    for chosen in (records, records[100:200:3], evenly_spaced(records, 5)):
        sent = pickle.dumps(chosen)
        assert list(pickle.loads(sent)) == list(chosen)
        assert threshold or len(sent) < 3_000


def test_a_changed_file_is_read_anew_and_the_older_form_is_removed(folder, large):
    read_train(as_json(folder), folder)
    write(folder / "d.json", json.dumps(ROWS[:4]))
    assert len(read_train(folder / "d.json", folder)) == 4
    assert len(list((folder / "cache" / "records").glob("*.arrow"))) == 1


@pytest.mark.parametrize("kind", [as_parquet, as_saved])
def test_pictures_inside_a_file_are_decoded_from_it(kind, folder):
    encoded = BytesIO()
    Image.new("RGB", (4, 4), (0, 0, 250)).save(encoded, "PNG")
    picture = {"bytes": encoded.getvalue(), "path": "b.png"}
    record = read_train(kind(folder, [{**row, "images": [picture]} for row in ROWS]), folder)[7]
    assert images_of(record)[0].getpixel((0, 0)) == (0, 0, 250)
    assert record.media[0].path.name == "b.png"


def test_a_saved_folder_with_pictures_of_its_own_type_is_read(folder):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture

    features = Features(
        {
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "images": List(Picture()),
        }
    )
    rows = [{"messages": ROWS[0]["messages"], "images": [Image.new("RGB", (4, 4), (0, 250, 0))]}]
    Dataset.from_list(rows, features=features).save_to_disk(str(folder / "saved"))
    [record] = read_train(folder / "saved", folder)
    assert images_of(record)[0].getpixel((0, 0)) == (0, 250, 0)


def test_a_dataset_info_beside_the_file_names_its_columns(folder):
    rows = [{"talk": ROWS[0]["messages"], "pics": ["a.png"]}]
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "d.json", "formatting": "sharegpt", "tags": tags}
    columns = {"messages": "talk", "images": "pics"}
    write(
        folder / "dataset_info.json", json.dumps({"mine": {**entry, "columns": columns}, "other": {"file_name": "x"}})
    )
    [record] = read_train(write(folder / "d.json", json.dumps(rows)), folder)
    assert record.question_answers() == [('Number 0, "[,]" ?', "yes")]
    wrong = {**entry, "columns": {**columns, "messages": "speech"}}
    write(folder / "dataset_info.json", json.dumps({"mine": wrong}))
    with pytest.raises(UserError, match=r"record 0: unknown shape: .*; its columns are as .*dataset_info\.json names"):
        read_train(folder / "d.json", folder)
    write(folder / "dataset_info.json", json.dumps({"mine": {**entry, "file_name": "e.json"}}))
    with pytest.raises(UserError, match=r"record 0: unknown shape: .*dataset_info\.json has no entry for d\.json"):
        read_train(folder / "d.json", folder)
    write(folder / "dataset_info.json", json.dumps({"mine": {**entry, "formatting": "csv"}}))
    with pytest.raises(UserError, match=r"formatting: .*'sharegpt', got 'csv' .*entry of d\.json"):
        read_train(folder / "d.json", folder)


def test_a_dataset_info_one_folder_up_names_files_below_it_and_may_not_contradict_itself(folder):
    entry = {"file_name": "sub/d.json", "columns": {"prompt": "q", "response": "a"}}
    write(folder / "dataset_info.json", json.dumps({"mine": entry}))
    (folder / "sub").mkdir()
    path = write(folder / "sub" / "d.json", json.dumps([{"q": "What?", "a": "A cat."}]))
    assert read_train(path, folder)[0].question_answers() == [("What?", "A cat.")]
    other = {**entry, "columns": {"prompt": "a", "response": "q"}}
    write(folder / "dataset_info.json", json.dumps({"mine": entry, "theirs": other}))
    with pytest.raises(UserError, match="2 entries of different content name"):
        read_train(path, folder)


def test_a_file_in_ones_own_format_can_be_graded_by_its_record_numbers(folder):
    rows = [{key: value for key, value in row.items() if key != "id"} for row in ROWS]
    records = read_test(write(folder / "t.json", json.dumps(rows)), folder)
    assert [record.id for record in records] == [str(number) for number in range(12)]


def test_a_byte_order_mark_and_a_wrong_line_are_no_riddles(folder):
    (folder / "d.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert len(read_train(folder / "d.json", folder)) == 12
    lines = "\n".join([*map(json.dumps, ROWS[:3]), '{"id": ', *map(json.dumps, ROWS[3:])])
    with pytest.raises(UserError, match="line 4:"):
        read_train(write(folder / "d.jsonl", lines), folder)


def test_twenty_faults_are_shown_and_the_rest_counted(folder, large):
    path = write(folder / "d.json", json.dumps([{**ROWS[0], "images": []}] * 31 + ROWS))
    with pytest.raises(UserError) as caught:
        read_train(path, folder)
    lines = str(caught.value).splitlines()
    assert lines[0] == "31 faults:" and len(lines) == 22 and lines[-1].strip() == "- ... and 11 more"
    assert not list((folder / "cache").rglob("*.arrow")) and not list((folder / "cache").rglob("*.tmp"))


@pytest.mark.parametrize(
    "text",
    ["[", "[1", '[{"id": 1}', '[{"id": 1} {"id": 2}]', '{"id": 1\n}', "[1,", "nonsense", "[{]", "[{}] [{}]", "[{}] x"],
)
def test_a_broken_file_is_named(text, folder):
    with pytest.raises(UserError, match=r"d\.json"):
        read_train(write(folder / "d.json", text), folder)


def test_a_folder_that_is_no_data_set_or_has_splits_is_refused(folder):
    from datasets import Dataset, DatasetDict

    with pytest.raises(UserError, match="was not saved by `datasets`"):
        read_train(folder, folder)
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(folder / "splits"))
    with pytest.raises(UserError, match="several splits: name one of train"):
        read_train(folder / "splits", folder)


@pytest.mark.slow
def test_reading_holds_neither_the_file_nor_its_records(folder, large, monkeypatch, caplog):
    """Python objects grow by no more than a few tens of bytes a record, of which one alone takes more than 1,000."""
    from datasets import Dataset  # noqa: F401  (its import is not what is measured)

    caplog.set_level(logging.ERROR, "mllm_keeplora")  # and back afterwards
    monkeypatch.setattr(readers, "CHUNK", 1 << 14)
    monkeypatch.setattr("mllm_keeplora.data.store.BATCH", 100)
    peaks = []
    for count in (2_000, 20_000):
        path = folder / f"{count}.json"
        with open(path, "w", encoding="utf-8") as handle:
            handle.write("[" + ",".join(json.dumps(conversation(number)) for number in range(count)) + "]")
        tracemalloc.start()
        total = sum(len(record.question) for record in read_train(path, folder))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total > 10 * count
    assert peaks[1] - peaks[0] < 64 * 18_000, peaks


def test_a_selection_names_records_of_several_files(folder):
    first, second = read_train(as_json(folder), folder), read_train(as_lines(folder), folder)
    chosen = Selection(ConcatDataset([first, second]), [0, 23, 11, 12, 0])
    assert [record.id for record in chosen] == ["0", "11", "11", "0", "0"]
    assert chosen[1] == second[11] and [record.id for record in chosen[1:3]] == ["11", "11"]
    with pytest.raises(IndexError):
        chosen[5]
    assert [record.id for record in first[2:9:3]] == ["2", "5", "8"]


def test_question_ids_are_unique_in_a_large_file_too(folder, large):
    row = {"question_id": "q", "text": "?", "answer": "A"}
    with pytest.raises(UserError, match="record 1: question_id 'q' occurs twice"):
        read_test(write(folder / "t.json", json.dumps([row, row])), folder)


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("", "record 2: the file ends before the array does"),
        (",", "record 3: the file ends before the array does"),
        ("{}]", "expected a comma before record 3"),
        (",{", "record 3: "),
    ],
)
def test_a_json_array_that_breaks_off_is_told_with_its_record(folder, end, told):
    path = write(folder / "d.json", json.dumps(ROWS[:1] * 3)[:-1] + end)
    with pytest.raises(UserError, match=told):
        read_train(path, folder)
