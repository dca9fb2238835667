"""A user's mistake gives one clear message, exit code 2, no traceback, and leaves the output folder alone."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.integration.commands import Said, content, shell
from tests.integration.processes import command_in_child
from tests.support.tiny import tiny_benchmark


class Desk:
    """A run's YAML with data of its own, to be spoilt by a test."""

    def __init__(self, folder: Path, settings: Callable):
        self.output = folder / "out"
        self.data = folder / "data"
        self.file = folder / "run.yaml"
        self.values = settings(self.output, None, benchmark=tiny_benchmark(self.data, ("Alpha", "Beta")))

    def change(self, part: str, edit: Callable) -> None:
        """Edit the first record of one of Alpha's files, `train` or `test`."""
        path = self.data / "Alpha" / f"{part}.json"
        rows = json.loads(path.read_text())
        edit(rows[0])
        path.write_text(json.dumps(rows))

    def write(self) -> Path:
        self.file.write_text(yaml.safe_dump(self.values))
        return self.file


@pytest.fixture
def desk(world, settings, tmp_path) -> Desk:
    shutil.copytree(world / "data", tmp_path / "data")
    return Desk(tmp_path, settings)


def assert_refused(said: Said, *parts: str) -> None:
    """One message, one exit code; `parts` name the thing, the value and what is allowed."""
    assert said.code == 2, said.err
    assert said.err.count("error:") == 1
    assert "Traceback" not in said.err + said.out
    for part in parts:
        assert part in said.err


OVERRIDES = {
    "unknown key": ("train.learning=3", ["train.learning is not a known key", "got 3"]),
    "unknown section": ("trian.lr=3", ["trian is not a known key"]),
    "wrong type": ("train.batch_size=many", ["train.batch_size", "integer", "'many'"]),
    "out of range": ("train.lr=-1", ["train.lr", "greater than 0", "got -1"]),
    "not a choice": ("eval.domains=some", ["eval.domains", "'seen' or 'all'", "'some'"]),
    "unknown strategy": ("strategy.name=keplora", ["'keplora'", "finetune", "keeplora"]),
    "unknown strategy option": ("strategy.rang=4", ["not a known key of strategy keeplora, got 4", "mean rank"]),
    "strategy option out of range": ("strategy.energy_weights=1.5", ["strategy.energy_weights", "1.5", "equal to 1"]),
    "unknown preset": ("strategy.preset=best", ["strategy.preset 'best'", "mllm_dcl, mtil, official-llava"]),
    "unknown benchmark": ("benchmark=midi_dcl", ["'midi_dcl'", "mini_dcl"]),
    "unknown domain": ("domains=[Alpha, Delta]", ["'Delta'", "Alpha, Beta"]),
    "domain named twice": ("domains=[Alpha, Alpha]", ["'Alpha' twice"]),
    "no domain": ("domains=[]", ["domains is empty", "Alpha, Beta"]),
    "settings of an unknown domain": (
        "per_domain={Delta: {train: {lr: 1}}}",
        ["per_domain names 'Delta'", "Alpha, Beta"],
    ),
    "unknown setting of a domain": ("per_domain={Beta: {train: {rate: 1}}}", ["per_domain.Beta.train.rate"]),
    "unknown scorer": ("benchmark.defaults.scorer=fair", ["unknown scorer 'fair'", "exact", "ucit_exact"]),
    "unknown base": ("base.model=tiny-lava", ["base.model 'tiny-lava'", "tiny-llava", "owner/name"]),
    "base folder without weights": ("base.model=tests", ["base", "config.json"]),
    "unknown deepspeed": ("deepspeed=zero9", ["deepspeed 'zero9'", "zero1, zero2, zero3, zero3_offload"]),
    "override without value": ("train.lr", ["key=value", "'train.lr'"]),
    "override below a value": ("name.x=1", ["name is a single value"]),
    "missing data file": (
        "benchmark.domains.Alpha.train=nowhere.json",
        ["Alpha: its training file", "nowhere.json does not exist"],
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_wrong_setting_is_refused(name, desk, command):
    override, parts = OVERRIDES[name]
    assert_refused(command("run", desk.write(), override), *parts)
    assert not desk.output.exists()


def _says(position: int, key: str, text: str) -> Callable:
    return lambda row: row["conversations"][position].update({key: text})


RECORDS = {
    "missing image": ("train", lambda row: row.update(image="images/none.png"), ["'images/none.png'", "not exist"]),
    "image above the folder": ("train", lambda row: row.update(image="../Beta/images/x.png"), ["leaves the data"]),
    "image with an absolute path": ("test", lambda row: row.update(image="/etc/hostname"), ["'/etc/hostname'"]),
    "image of a wrong type": ("train", lambda row: row.update(image=3), ["image must be a path", "got 3"]),
    "no mark for the image": ("train", _says(0, "value", "what ?"), ["0 <image> marks for 1 images"]),
    "two marks for one image": ("train", _says(0, "value", "<image><image> what ?"), ["2 <image> marks for 1 images"]),
    "mark in a test question": ("test", lambda row: row.update(text="<image> what ?"), ["carries no <image> mark"]),
    "two turns of one role": ("train", _says(1, "from", "human"), ["alternate human, gpt", "['user', 'user']"]),
    "unknown role": ("train", _says(1, "from", "bot"), ["human|gpt", "'bot'"]),
    "empty answer": ("train", _says(1, "value", " "), ["a gpt turn is empty"]),
    "no conversations": ("train", lambda row: row.pop("conversations"), ["unknown shape", "keys are"]),
    "no answer": ("test", lambda row: row.pop("answer"), ["answer must be a str", "None"]),
    "loss switched off": ("train", _says(1, "loss", False), ["no token is trained"]),
    "no question_id": ("test", lambda row: row.pop("question_id"), ["question_id is missing"]),
    "duplicate question_id": ("test", lambda row: row.update(question_id="test1"), ["'test1' occurs twice"]),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_wrong_record_is_refused_with_its_place(name, desk, command):
    part, edit, parts = RECORDS[name]
    desk.change(part, edit)
    place = f"Alpha/{part}.json record {1 if name.startswith('duplicate') else 0}"
    assert_refused(command("run", desk.write()), place, *parts)
    assert not desk.output.exists()


FILES = {
    "empty data": ("[]", ["is empty"]),
    "another shape": ('{"a": 1}', ["record 0", "unknown shape", "keys are ['a']"]),
    "broken JSON": ('[{"id": ', ["neither one JSON array nor one JSON object a line", "record 0: "]),
    "records that are no objects": ("[1]", ["record 0", "must be a JSON object", "int"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_wrong_data_file_is_refused(name, desk, command):
    text, parts = FILES[name]
    (desk.data / "Beta" / "train.json").write_text(text)
    assert_refused(command("run", desk.write()), "Beta/train.json", *parts)
    assert not desk.output.exists()


def test_a_record_that_is_longer_than_the_limit_is_refused_with_its_length(desk, command):
    desk.change("train", lambda row: row["conversations"][0].update(value="<image>\n" + "what colour ? " * 20))
    said = command("run", desk.write(), "train.max_length=60")
    assert_refused(said, "Alpha/train.json record 0", "tokens, train.max_length allows 60", "image or answer tokens")
    assert command("check", desk.write(), "train.max_length=128").code == 0


def test_gold_answers_that_the_scorer_cannot_grade_by_are_refused(desk, command):
    said = command("run", desk.write(), "benchmark.defaults.scorer=coin_grounding")
    assert_refused(said, "Alpha/test.json record 0", "record 7", "box")


def test_many_faults_are_counted_and_twenty_shown(desk, command):
    path = desk.data / "Alpha" / "train.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps([{**row, "image": 3} for row in rows * 3]))
    said = command("check", desk.write())
    assert_refused(said, f"{3 * len(rows)} faults", "Alpha/train.json record 19", f"and {3 * len(rows) - 20} more")
    assert "record 20:" not in said.err


def test_a_truncated_image_is_refused_with_the_record_that_names_it(desk, command):
    path = desk.data / "Alpha" / "images" / "train_3.png"
    path.write_bytes(path.read_bytes()[:200])
    assert_refused(command("run", desk.write()), "train.json record 3", "train_3.png cannot be read")
    assert not desk.output.exists()


def test_a_file_that_is_no_image_is_refused(desk, command):
    (desk.data / "Alpha" / "images" / "test_0.png").write_text("hello")
    assert_refused(command("check", desk.write()), "test.json record 0", "test_0.png cannot be read")


@pytest.mark.parametrize(
    ("text", "parts"),
    [("name: [a", ["not readable YAML"]), ("- a\n- b\n", ["must hold keys and values", "list"]), ("", ["NoneType"])],
)
def test_a_broken_yaml_is_refused(text, parts, desk, command):
    desk.file.write_text(text)
    assert_refused(command("run", desk.file), "run.yaml", *parts)


def test_an_absent_config_is_refused_with_the_shipped_names(desk, command):
    assert_refused(command("run", desk.file), f"no config file {desk.file}", "mini_dcl")
    assert_refused(command("run", "mini_cdl"), "'mini_cdl'", "mini_dcl", ".yaml path")


def test_several_faults_are_told_at_once(desk, command):
    desk.change("train", lambda row: row.update(image="none.png"))
    desk.change("test", lambda row: row.pop("answer"))
    del desk.values["benchmark"]["suites"]
    said = command("check", desk.write(), "strategy.name=magic", "base.model=nothing", "deepspeed=zero9")
    assert_refused(said, "5 faults:", "'magic'", "'nothing'", "'zero9'", "'none.png'", "answer must be a str")
    assert len(said.err.strip().splitlines()) == 6


def test_what_zero3_cannot_do_is_told_before_a_run(desk, command):
    desk.change("train", lambda row: (row.pop("image"), row["conversations"][0].update(value="is it red ?")))
    said = command("check", desk.write(), "deepspeed=zero3")
    assert_refused(said, "Alpha mixes records with images", "zero2")
    said = command("check", desk.write(), "deepspeed=zero3", "base.quantization=nf4")
    assert_refused(said, "2 faults:", "'nf4'", "does not divide quantised weights", "Alpha mixes records with images")
    assert command("check", desk.write(), "deepspeed=zero2").code == 0


def test_several_unknown_keys_are_told_at_once(desk, command):
    said = command("run", desk.write(), "nmae=a", "train.lrr=1", "eval.limit=0")
    assert_refused(said, "3 faults:", "nmae", "train.lrr", "eval.limit")


def test_a_folder_that_holds_something_else_is_not_written_to(desk, command):
    desk.output.mkdir()
    (desk.output / "thesis.txt").write_text("dear")
    assert_refused(command("run", desk.write()), str(desk.output), "not empty and holds no run", "`output`")
    assert {name for name in content(desk.output) if name != ".lock"} == {"thesis.txt"}


def test_the_folder_of_another_run_is_refused_with_the_difference(settings, two, tmp_path, command):
    copy = shutil.copytree(two, tmp_path / "copy")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(copy)))
    before = content(two)
    said = command("run", tmp_path / "run.yaml", "seed=3", "train.lr=0.5")
    assert_refused(said, "started with another config", "seed: 0", "3 now", "Alpha.train.lr: 0.03", "0.5 now")
    assert {name: data for name, data in content(copy).items() if name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }


def test_a_damaged_or_later_ledger_is_refused(desk, command):
    desk.output.mkdir()
    (desk.output / "run.json").write_text('{"format": ')
    assert_refused(command("run", desk.write()), "run.json is damaged: it is not readable JSON")
    (desk.output / "run.json").write_text('{"format": 99}')
    assert_refused(command("run", desk.write()), "has format 99", "reads 1")


def test_from_and_after_belong_together(desk, two, command):
    assert_refused(command("run", desk.write(), "--after", "1"), "--from RUN and --after N belong together")
    assert_refused(command("run", desk.write(), "--from", two), "--from RUN and --after N belong together")
    assert not desk.output.exists()


@pytest.mark.parametrize("after", ["0", "3", "-1"])
def test_after_out_of_range_is_refused(after, settings, two, tmp_path, command):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "out")))
    said = command("run", tmp_path / "run.yaml", "--from", two, "--after", after)
    assert_refused(said, "--after must be between 1 and 2", f"got {after}")
    assert not (tmp_path / "out" / "run.json").exists()


def test_commands_on_a_folder_that_is_no_run_are_refused(tmp_path, command):
    for name in ("eval", "report"):
        assert_refused(command(name, tmp_path), f"{tmp_path} is not a run directory")
    assert list(tmp_path.iterdir()) == []


def test_eval_refuses_what_the_run_does_not_have(two, command):
    before = content(two)
    assert_refused(command("eval", two, "--after", "3"), "--after must be between 0 and 2", "got 3")
    assert_refused(command("eval", two, "--domains", "Alpha,Delta"), "'Delta'", "Alpha, Beta, general")
    assert_refused(command("eval", two, "--suite", "special"), "'special'", "Alpha, Beta, general", ".json")
    assert_refused(command("eval", two, "--suite", "none.json"), "none.json does not exist")
    assert {name for name in content(two) if name != ".lock"} == {name for name in before if name != ".lock"}


def test_list_says_which_kinds_it_knows(command):
    assert_refused(command("list", "methods"), "'methods'", "strategies, models, benchmarks, runs and sweeps")


def test_wrong_use_of_the_command_line_exits_with_2(command):
    for words in (["walk"], ["run"], ["run", "mini_dcl", "--fast"], ["eval", "x", "--batch-size", "0"]):
        assert command(*words).code == 2


def test_a_real_process_exits_with_2_and_one_message(desk):
    said = shell("run", desk.write(), "train.lrr=4")
    assert_refused(said, "train.lrr is not a known key")
    assert "torch" not in said.err
    said = command_in_child("run", desk.write(), "strategy.rang=4")
    assert_refused(said, "strategy.rang is not a known key")
    desk.change("train", lambda row: row.update(image="../secret.png"))
    assert_refused(command_in_child("check", desk.write()), "'../secret.png' leaves the data folder")
    assert not desk.output.exists()


LATE = {
    "batch_size that does not divide": (
        ["train.batch_size=6", "train.micro_batch_size=4"],
        ["train.batch_size 6", "4 x 1"],
    ),
    "unknown Trainer argument": (["train.args={warp_drive: 9}"], ["warp_drive"]),
    "unknown schedule": (["train.schedule=zigzag"], ["zigzag"]),
    "schedule that lacks arguments": (["train.schedule=warmup_stable_decay"], ["train.schedule 'warmup_stable_decay'"]),
    "quantization": (["base.quantization=fp3"], ["base.quantization", "fp3", "nf4"]),
    "attention": (["base.attn=flash_attention_2"], ["flash-attn", "sdpa"]),
    "prompt": (["base.prompt=vicuna"], ["base.prompt 'vicuna'"]),
}


@pytest.mark.parametrize("name", LATE)
def test_a_setting_that_would_fail_late_is_refused_before_anything_runs(name, desk, command):
    overrides, parts = LATE[name]
    assert_refused(command("run", desk.write(), *overrides), *parts)
    assert not desk.output.exists()


def test_a_checkpoint_of_the_original_llava_code_names_its_converter(desk, command, tmp_path):
    (tmp_path / "llava").mkdir()
    config = {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/clip"}
    (tmp_path / "llava/config.json").write_text(json.dumps(config))
    said = command("run", desk.write(), f"base.model={tmp_path}/llava")
    assert_refused(said, "original LLaVA code", "convert_llava_weights_to_hf.py")


def test_target_layers_that_are_not_there_are_refused_before_anything_runs(desk, command):
    said = command("run", desk.write(), "adapters.target=[q_prj]")
    assert_refused(said, "adapters.target 'q_prj'", "q_proj")
    assert not desk.output.exists()


def test_deepspeed_that_is_not_installed_is_named_with_its_remedy(desk, command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    said = command("run", desk.write(), "deepspeed=zero2")
    assert_refused(said, "deepspeed", "not installed", "pip install")
    assert not desk.output.exists()
