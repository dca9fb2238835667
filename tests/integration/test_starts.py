"""Starts are cheap, look again when rules change, and notice every picture that is not the run's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mllm_keeplora.checks import records as trials
from mllm_keeplora.checks.run import check_run
from mllm_keeplora.config import parse_config
from mllm_keeplora.data.media import images
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval import harness
from mllm_keeplora.models import ChatPrompt
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.system.distributed import dealt_back
from tests.integration.processes import command_in_child, run_in_child
from tests.support.tiny import tiny_benchmark, write_tiny_data

TRAIN, TEST = 150, 10


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MLLM_KEEPLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How many pictures were decoded, and how many records were shown to the processor."""
    counts = {"pictures": 0, "records": 0}

    def counting(owner, name, kind):
        real = getattr(owner, name)

        def call(*arguments):
            counts[kind] += 1
            return real(*arguments)

        monkeypatch.setattr(owner, name, call)

    counting(images, "as_shown", "pictures")
    counting(ChatPrompt, "total_tokens", "records")
    counting(ChatPrompt, "question_tokens", "records")
    return counts


@pytest.fixture
def values(settings, tmp_path) -> dict:
    """The config of a run over one domain of many pictures and as many texts."""
    data = write_tiny_data(tmp_path / "data", train=TRAIN, test=TEST, domains=("Alpha",))
    for part in ("train", "test"):
        rows = json.loads((data / f"Alpha/{part}.json").read_text())
        for number, row in enumerate(rows):
            if part == "train":
                row["conversations"][0]["value"] += f" {number}"
            else:
                row["text"] += f" {number}"
        (data / f"Alpha/{part}.json").write_text(json.dumps(rows))
    return settings(tmp_path / "run", ("Alpha",), benchmark=tiny_benchmark(data, ("Alpha",), suite=False))


def test_the_second_start_decodes_no_picture_and_tries_no_record(values, counted):
    config = parse_config(values, "test")
    first = check_run(config)
    assert counted == {"pictures": TRAIN + TEST, "records": TRAIN + TEST}
    again = check_run(config)
    assert counted == {"pictures": TRAIN + TEST, "records": TRAIN + TEST}
    assert (again.shown, again.notes, again.pictures) == (first.shown, first.notes, first.pictures)


def test_several_processes_know_the_pictures_as_one_does(values):
    config = parse_config(values, "test")
    shares = [check_run(config, share=(rank, 3)).shown for rank in range(3)]
    joined = {file: dealt_back([share["Alpha"][file] for share in shares]) for file in ("train", "test")}
    assert {"Alpha": joined} == check_run(config).shown


@pytest.mark.parametrize(
    ("at", "what"),
    [(TRAIN - 10, "mllm_keeplora.data.media.images:as_shown"), (100, "mllm_keeplora.models:ChatPrompt.total_tokens")],
)
def test_a_start_that_is_killed_half_way_is_not_begun_anew(values, counted, tmp_path, at, what):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    assert command_in_child("run", tmp_path / "run.yaml", kill=(what, at)).code == -9
    assert not (tmp_path / "run" / "run.json").exists()
    check_run(parse_config(values, "test"))
    kind = "pictures" if what.endswith("as_shown") else "records"
    assert counted[kind] <= TRAIN + TEST - at + 64 + 4  # what was not yet on disk, and what was being looked at


@pytest.mark.parametrize(("owner", "kind"), [(images, "pictures"), (trials, "records")])
def test_newer_rules_look_again(values, counted, monkeypatch, owner, kind):
    check_run(parse_config(values, "test"))
    monkeypatch.setattr(owner, "RULES", owner.RULES + 1)
    check_run(parse_config(values, "test"))
    assert counted[kind] == 2 * (TRAIN + TEST)


def test_pictures_and_records_are_known_by_content_wherever_they_lie(values, counted, tmp_path):
    check_run(parse_config(values, "test"))
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    check_run(parse_config({**values, "benchmark": tiny_benchmark(tmp_path / "moved", ("Alpha",), False)}, "test"))
    assert counted == {"pictures": TRAIN + TEST, "records": TRAIN + TEST}


def test_another_template_limit_or_suffix_is_tried_anew(values, counted):
    check_run(parse_config(values, "test"))
    tried = counted["records"]
    for changed in (
        {"train": {**values["train"], "max_length": 100}},
        {"base": {**values["base"], "prompt": "vicuna_v1"}},
    ):
        check_run(parse_config({**values, **changed}, "test"))
        assert counted["records"] >= tried + TRAIN
        tried = counted["records"]


def test_a_fault_is_told_at_every_start(values, tmp_path):
    (tmp_path / "data/Alpha/images/train_7.png").write_bytes(b"no picture")
    rows = json.loads((tmp_path / "data/Alpha/train.json").read_text())
    rows[3]["conversations"][1]["value"] = "red </s>"
    (tmp_path / "data/Alpha/train.json").write_text(json.dumps(rows))
    told = []
    for _ in range(2):
        with pytest.raises(UserError) as error:
            check_run(parse_config(values, "test"))
        told.append(error.value.sentences)
    assert told[0] == told[1] and len(told[0]) == 2
    assert "train_7.png" in told[0][0] and "'</s>'" in told[0][1]


def test_a_damaged_memory_is_no_fault(values, cache, counted):
    check_run(parse_config(values, "test"))
    (cache / "known.sqlite").write_bytes(b"damaged" * 999)
    check_run(parse_config(values, "test"))
    assert counted["pictures"] == 2 * (TRAIN + TEST)
    check_run(parse_config(values, "test"))
    assert counted["pictures"] == 2 * (TRAIN + TEST)


# -- a run's own pictures --------------------------------------------------------------------------------------------


@pytest.fixture
def run(two, world, settings, tmp_path):
    """A finished run over data of its own, as (folder, data, config)."""
    shutil.copytree(two, tmp_path / "old")
    data = shutil.copytree(world / "data", tmp_path / "data")
    for path in (tmp_path / "old/run.json", tmp_path / "old/config.yaml"):
        path.write_text(path.read_text().replace(str(world / "data"), str(data)))
    return tmp_path / "old", data, settings(tmp_path / "old", benchmark=tiny_benchmark(data))


@pytest.mark.parametrize(("part", "record"), [("train", 5), ("test", 2)])
def test_a_picture_that_was_replaced_is_refused_by_name(part, record, settings, world, tmp_path):
    data = shutil.copytree(world / "data", tmp_path / "data")
    values = settings(tmp_path / "run", benchmark=tiny_benchmark(data))
    kill = ("mllm_keeplora.training.fit:Reporter.on_step_end", 3)
    assert run_in_child(values, kill=kill) == -9
    before = (tmp_path / "run/run.json").read_bytes()
    path = data / f"Beta/images/{part}_{record}.png"
    kept = path.read_bytes()
    Image.new("RGB", (32, 32), "red").save(path)
    with pytest.raises(UserError) as error:
        run_sequence(parse_config(values, "test"))
    assert f"Beta: its {part} pictures are not those that the run was started with" in str(error.value)
    assert f"Beta: another picture is {path} of {data}/Beta/{part}.json record {record}" in str(error.value)
    assert "Alpha" not in str(error.value) and (tmp_path / "run/run.json").read_bytes() == before
    path.write_bytes(kept)
    assert run_in_child(values) == 0


def test_a_run_that_did_not_record_its_pictures_says_so_once_and_knows_them_from_then_on(run):
    folder, data, values = run
    ledger = json.loads((folder / "run.json").read_text())
    for entry in (*ledger["domains"], *ledger["suites"]):
        del entry["pictures"]
    (folder / "run.json").write_text(json.dumps(ledger))
    shutil.rmtree(folder / "pictures")
    for _ in range(2):
        run_sequence(parse_config(values, "test"))
        notes = [note["text"] for note in json.loads((folder / "run.json").read_text())["notes"]]
        assert len([note for note in notes if note.startswith("pictures of Alpha, Beta, general")]) == 1
    Image.new("RGB", (32, 32), "red").save(data / "Alpha/images/train_0.png")
    with pytest.raises(UserError, match=r"another picture is .*train_0\.png"):
        run_sequence(parse_config(values, "test"))


def test_a_run_whose_list_of_pictures_is_lost_names_the_domain(run):
    folder, data, values = run
    shutil.rmtree(folder / "pictures")
    Image.new("RGB", (32, 32), "red").save(data / "Alpha/images/train_0.png")
    with pytest.raises(UserError, match="Alpha: its train pictures are not those"):
        run_sequence(parse_config(values, "test"))
    assert not (folder / "pictures").exists()


def test_rules_of_today_look_into_a_run_that_was_started_under_older_ones(run, monkeypatch):
    _, _, values = run
    monkeypatch.setattr(images, "as_shown", lambda picture: (_ for _ in ()).throw(ValueError("refused today")))
    with pytest.raises(UserError, match=r"train\.json record 0: image .* refused today"):
        run_sequence(parse_config(values, "test"))


def test_a_saved_run_is_not_asked_about_other_pictures(run, command):
    folder, data, _ = run
    Image.new("RGB", (32, 32), "red").save(data / "Beta/images/test_3.png")
    said = command("eval", folder, "--domains", "Beta")
    assert said.code == 2 and "Beta: its test pictures have changed" in said.err


def test_base_answers_to_other_pictures_are_not_shared(world, settings, tmp_path):
    data = shutil.copytree(world / "data", tmp_path / "data")
    shared = {"base_answers": str(tmp_path / "shared")}
    for number in (1, 2):
        values = settings(
            tmp_path / f"run{number}", ("Alpha",), benchmark=tiny_benchmark(data, suite=False), eval=shared
        )
        assert run_in_child(values, kill=("mllm_keeplora.stages.gradient:gradient", 1)) in (-9, 0)
        Image.new("RGB", (32, 32), "red").save(data / "Alpha/images/test_1.png")
    assert len(list((tmp_path / "shared").glob("Alpha-*/facts.json"))) == 2


def test_answers_of_a_model_to_other_pictures_are_not_taken_over(world, settings, tmp_path, command, monkeypatch):
    data = shutil.copytree(world / "data", tmp_path / "data")
    values = settings(tmp_path / "unused", ("Alpha",), benchmark=tiny_benchmark(data, ("Alpha",), suite=False))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    words = ["eval", world / "base", "--benchmark", tmp_path / "run.yaml", "--output", tmp_path / "answers"]
    kill = ("+mllm_keeplora.eval.harness:Journal.add", 1)
    assert command_in_child(*words, kill=kill).code == -9
    Image.new("RGB", (32, 32), "red").save(data / "Alpha/images/test_1.png")
    asked, real = [], harness.generate
    monkeypatch.setattr(harness, "generate", lambda *given: asked.append(given) or real(*given))
    assert command(*words).code == 0
    assert len(asked) == 2  # batches: none of them is taken over
