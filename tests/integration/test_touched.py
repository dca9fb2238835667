"""Runs whose files or data somebody has touched since: named in a sentence, mended where they can be, never mixed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mllm_keeplora.system import files
from tests.integration.commands import content
from tests.integration.processes import differing, results
from tests.support.tiny import tiny_benchmark

ANSWERS = "domains/02_Beta/predictions/Alpha.jsonl"


@pytest.fixture
def copy(two, tmp_path) -> Path:
    return shutil.copytree(two, tmp_path / "run")


@pytest.fixture
def data(copy, world, tmp_path) -> Path:
    """A copy of the data, which the copied run takes for its own."""
    folder = shutil.copytree(world / "data", tmp_path / "data")
    ledger = copy / "run.json"
    ledger.write_text(ledger.read_text().replace(f"{(world / 'data').resolve()}/", f"{folder.resolve()}/"))
    return folder


def change_gold(data: Path) -> None:
    rows = json.loads((data / "Alpha/test.json").read_text())
    (data / "Alpha/test.json").write_text(json.dumps([{**row, "answer": "nothing"} for row in rows]))


def stripped(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name != ".lock"}


def test_a_run_is_asked_again_where_its_training_records_are_gone(copy, data, command):
    """What is answered blindly comes from them, and stays as it was measured."""
    before = results(copy)
    assert None not in before["blind"]
    for name in ("Alpha", "Beta"):
        (data / name / "train.json").unlink()
    for words in (["eval", copy, "--domains", "Beta"], ["rescore", copy], ["report", copy]):
        assert command(*words).code == 0, words
        assert {key: results(copy)[key] for key in ("blind", "blind_per_type", "score_matrix")} == {
            key: before[key] for key in ("blind", "blind_per_type", "score_matrix")
        }


def test_a_set_whose_gold_answers_have_changed_is_not_asked_again(copy, data, command):
    before = stripped(copy)
    change_gold(data)
    said = command("eval", copy, "--domains", "Beta,Alpha")
    assert said.code == 2 and f"Alpha: {data / 'Alpha/test.json'} has changed since" in said.err, said.err
    assert stripped(copy) == before
    (data / "Alpha/test.json").unlink()
    said = command("eval", copy)
    assert said.code == 2 and f"{data / 'Alpha/test.json'} does not exist any more" in said.err, said.err


def test_new_gold_answers_are_taken_over_for_all_stored_answers_and_noted(copy, two, data, command):
    change_gold(data)
    said = command("rescore", copy)
    assert said.code == 0, said.err
    matrix = results(copy)["score_matrix"]
    assert [row[0] for row in matrix] == [0.0, 0.0] and matrix[1][1] > 0
    assert f"Alpha is graded by {data / 'Alpha/test.json'} as it is now" in (copy / "run.json").read_text()
    assert command("eval", copy, "--domains", "Alpha").out.split() == ["Alpha", "0.00"]
    assert results(copy)["identity"]["data"] != results(two)["identity"]["data"], "they are not to be compared"


def test_answers_to_one_file_are_not_lost_to_another_of_the_same_name(copy, data, command):
    for name in ("Beta", "Gamma"):
        rows = json.loads((data / name / "test.json").read_text())[:3]
        (data / name / "more.json").write_text(
            json.dumps([{**row, "question_id": name + row["question_id"]} for row in rows])
        )
    assert command("eval", copy, "--suite", data / "Beta/more.json").code == 0
    answers = copy / "domains/02_Beta/predictions/more.jsonl"
    before = answers.read_bytes()
    said = command("eval", copy, "--suite", data / "Gamma/more.json")
    assert said.code == 2 and str(answers) in said.err and "Gamma/more.json another name" in said.err, said.err
    assert answers.read_bytes() == before
    assert command("eval", copy, "--suite", data / "Beta/more.json").code == 0


@pytest.mark.parametrize(
    ("path", "text", "told"),
    [
        (ANSWERS, '{"id": 1}\n{"id"', "line 2 is not readable JSON"),
        ("config.yaml", None, "No such file"),
        ("domains/02_Beta/adapter/adapter_model.safetensors", None, "is missing"),
        ("domains/02_Beta/adapter/adapter_model.safetensors", "", "is damaged"),
        ("domains/01_Alpha/manifest.json", "{", "is damaged: it is not readable JSON"),
    ],
)
def test_a_damaged_file_is_named(path, text, told, copy, command):
    (copy / path).unlink() if text is None else (copy / path).write_text(text)
    said = command("eval", copy, "--domains", "Beta")
    assert said.code == 2 and str(copy / path) in said.err and told in said.err, said.err
    assert "Traceback" not in said.err


def test_answers_that_are_gone_are_asked_for_again(copy, two, settings, world, tmp_path, command):
    (copy / ANSWERS).unlink()
    values = settings(copy, benchmark=tiny_benchmark(world / "data"))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    said = command("run", tmp_path / "run.yaml")
    assert said.code == 0, said.err
    assert differing(copy, two) == []
    assert results(copy)["score_matrix"] == results(two)["score_matrix"]
    notes = [note["text"] for note in files.read_json(copy / "run.json")["notes"]]
    assert any(note.startswith(f"{copy / ANSWERS} is gone") for note in notes)


def test_a_place_that_cannot_be_written_to_is_named(copy, settings, tmp_path, command):
    (tmp_path / "afile").write_text("x")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "afile" / "run")))
    for words in (
        ("run", tmp_path / "run.yaml"),
        ("export", copy, tmp_path / "afile/x"),
        ("report", copy, "--export", tmp_path / "afile/x"),
        ("compare", copy, "--output", tmp_path / "afile"),
    ):
        said = command(*words)
        assert said.code == 2 and f"{tmp_path / 'afile'}" in said.err, (words, said.err)
        assert "Traceback" not in said.err and len(said.err.strip().splitlines()) == 1, said.err
    assert (tmp_path / "afile").read_text() == "x"
