"""What a run will show the base's processor and ask of the Trainer, the check does first; refusals have names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mllm_keeplora.checks.records import load_family
from mllm_keeplora.checks.run import check_run
from mllm_keeplora.config import BaseConfig, parse_config
from mllm_keeplora.data.readers import read_test, read_train
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.harness import generate
from mllm_keeplora.models import load_base
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.training import fit
from mllm_keeplora.training.trainer import DomainTrainer
from tests.support.families import build_family
from tests.support.tiny import tiny_benchmark, write_tiny_data


@pytest.fixture
def data(tmp_path) -> Path:
    """One domain of few records that a test may change."""
    return write_tiny_data(tmp_path / "data", train=6, test=4, domains=("Alpha",))


@pytest.fixture
def config(settings, data, tmp_path):
    """Function (base, **changes) -> the config of a run over that domain."""

    def build(base=None, **changes):
        benchmark = tiny_benchmark(data, ("Alpha",), suite=False)
        values = settings(tmp_path / "run", ("Alpha",), benchmark=benchmark, **changes)
        values["base"] = {"model": str(base)} if base is not None else values["base"]
        return parse_config(values, origin="test")

    return build


def change(path: Path, index: int, **values) -> None:
    rows = json.loads(path.read_text())
    rows[index] |= values
    path.write_text(json.dumps(rows))


def faults(config) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_run(config)
    return list(caught.value.sentences)


STRIP = "absolute aspect ratio must be smaller than 200"  # what Qwen-VL's processor says


def test_pictures_that_the_processor_refuses_are_told_with_record_and_file(config, data, tmp_path):
    base = build_family("qwen2.5-vl", tmp_path / "qwen")
    for name in ("train_3", "test_1"):
        Image.new("RGB", (1820, 8), "red").save(data / f"Alpha/images/{name}.png")
    told = faults(config(base))
    shown = "the base's processor refuses it ({}.png of 1820 x 8 pixels): " + STRIP
    assert [fault.split(", got")[0].split("Alpha/")[1] for fault in told] == [
        f"train.json record 3: {shown.format('train_3')}",
        f"test.json record 1: {shown.format('test_1')}",
    ]
    loaded = load_base(BaseConfig(model=str(base)), "keeplora")
    with pytest.raises(UserError, match=rf"train\.json record 3: the base's processor refuses it .*{STRIP}"):
        loaded.family.training_batch(read_train(data / "Alpha/train.json", data / "Alpha")[2:5])
    asked = read_test(data / "Alpha/test.json", data / "Alpha")
    with pytest.raises(UserError, match=rf"test\.json record 1: the base's processor refuses it .*{STRIP}"):
        generate(loaded, loaded.model, asked, [""] * len(asked), 3)


@pytest.mark.parametrize("token", ["</s>", "<pad>"])
def test_text_that_spells_a_control_token_is_refused_by_name(token, config, data):
    change(data / "Alpha/test.json", 2, text=f"what {token} is it ?")
    talk = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": f"red {token}"}]
    change(data / "Alpha/train.json", 1, conversations=talk)
    told = faults(config())
    assert len(told) == 2 and all(f"its text spells {token!r}, a control token of the base" in fault for fault in told)
    assert "train.json record 1" in told[0] and "test.json record 2" in told[1]


def test_records_longer_than_the_bases_positions_are_named_where_no_limit_is_set(config, data):
    long = "what colour is the square ? " * 30
    change(data / "Alpha/test.json", 0, text=long)
    talk = [{"from": "human", "value": f"<image>\n{long}"}, {"from": "gpt", "value": "red"}]
    change(data / "Alpha/train.json", 0, conversations=talk)
    told = faults(config())
    assert "train.json record 0" in told[0] and "the base has places for 128" in told[0]
    assert "test.json record 0" in told[1] and "the base has places for 128, answer included" in told[1]
    assert "the base has places for 128" in faults(config(train={"max_length": 999}))[0]
    assert "train.max_length allows 100" in faults(config(train={"max_length": 100}))[0]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_answers_are_greedy_with_a_cache_whatever_the_bases_files_ask_for(file, world, data, tmp_path):
    bent = shutil.copytree(world / "base", tmp_path / "bent")
    values = json.loads((bent / file).read_text())
    if file == "config.json":
        values["text_config"]["use_cache"] = False
        (bent / "generation_config.json").unlink()
    else:
        values |= {
            "use_cache": False,
            "repetition_penalty": 9.0,
            "min_new_tokens": 3,
            "do_sample": True,
            "num_beams": 2,
        }
    (bent / file).write_text(json.dumps(values))
    records = read_test(data / "Alpha/test.json", data / "Alpha")
    records[1] = replace(records[1], turns=(replace(records[1].turns[0], text="where ?"),))
    found = []
    for folder in (world / "base", bent):
        base = load_base(BaseConfig(model=str(folder)), "keeplora")
        before = base.model.generation_config
        found.append([each.text for each in generate(base, base.model, records, [""] * 4, 6)])
        assert base.model.generation_config is before
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"optim": "galore_adamw"}, "galore_torch"),
        ({"use_liger_kernel": True}, "liger"),
        ({"fsdp": "full_shard"}, "distributed training"),
        ({"report_to": "wandb"}, "wandb"),
        ({"eval_strategy": "steps"}, "eval_dataset"),
    ],
)
def test_what_the_trainer_will_refuse_is_told_before_anything_is_loaded(args, told, config):
    [fault] = faults(config(train={"args": args}))
    assert fault.startswith("train") and told in fault and "the Trainer refuses" in fault


def test_a_rehearsal_leaves_nothing_behind(config):
    check_run(config(train={"args": {"max_steps": 2}}))
    assert run_sequence(config(train={"args": {"max_steps": 2}})).complete


def test_what_max_steps_cuts_is_told_and_the_bar_knows(config, tmp_path, monkeypatch):
    totals, real = [], fit.progress_bar
    monkeypatch.setattr(fit, "progress_bar", lambda title, total: totals.append(total) or real(title, total))
    run_sequence(config(train={"args": {"max_steps": 2}}))
    assert totals == [2]
    told = (tmp_path / "run/log.txt").read_text()
    assert "6 records x 2 epochs, train.args.max_steps makes it 2 steps, not 3" in told


def test_check_counts_pictures_and_says_what_it_did_to_them(config, data, tmp_path, command):
    import yaml

    turned = Image.open(data / "Alpha/images/train_0.png")
    exif = turned.getexif()
    exif[0x0112] = 3
    turned.save(data / "Alpha/images/train_0.png", exif=exif)
    talk = [{"from": "human", "value": "what is it ?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": str(number), "conversations": talk} for number in range(3)]
    (data / "Beta").mkdir()
    (data / "Beta/train.json").write_text(json.dumps(rows))
    (data / "Beta/test.json").write_text(json.dumps([{"question_id": 1, "text": "what is it ?", "answer": "red"}]))
    values = config().resolved()
    values["benchmark"] = tiny_benchmark(data, ("Alpha", "Beta"), suite=False)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values | {"domains": ["Alpha", "Beta"]}))
    said = command("check", tmp_path / "run.yaml")
    assert said.code == 0, said.err
    assert "Alpha        6 train records (6 with pictures), 4 test records (4 with pictures)\n" in said.out
    assert "Beta         3 train records (0 with pictures), 1 test records (0 with pictures)\n" in said.out
    assert "note         1 pictures are turned by their EXIF note\n" in said.out
    assert "note         no train record of Beta has a picture\n" in said.out
    assert said.out.endswith("no faults found\n")


def test_check_says_what_it_could_not_look_at(config, tmp_path, command, monkeypatch):
    import yaml

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty"))
    values = config().resolved()
    values["base"]["model"] = "org/not-here"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    said = command("check", tmp_path / "run.yaml")
    assert said.code == 0, said.err
    assert "no faults found, but not looked at: the base's layers (" in said.out and "its processor" in said.out


def test_the_prompt_of_a_base_knows_its_control_tokens(world):
    prompt = load_family(BaseConfig(model=str(world / "base")), str(world / "base")).prompt
    assert prompt._controls.search("a <s> b") and not prompt._controls.search("a < s > <unknown> b")


def test_a_mean_of_micro_batches_is_that_of_their_means(config, data):
    """Against plain autograd: two micro-batches whose answers are of unlike length."""
    seen = {}
    original = DomainTrainer.compute_loss

    def watched(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, outputs = original(self, model, inputs, True, num_items_in_batch)
        losses, _ = self.context.base.family.losses(outputs.logits, inputs["labels"])
        seen.setdefault(self.loss_mean, []).append((total.item(), losses.mean().item(), losses.sum().item()))
        return (total, outputs) if return_outputs else total

    for mean in ("tokens", "micro_batches"):
        settings = {"loss_mean": mean, "batch_size": 6, "micro_batch_size": 3, "epochs": 1, "args": {"max_steps": 1}}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DomainTrainer, "compute_loss", watched)
            values = config(train=settings)
            run_sequence(values.model_copy(update={"output": f"{values.output}_{mean}"}))
    for total, own, _ in seen["micro_batches"]:
        assert total == pytest.approx(own / 2, rel=1e-5)
    counts = [round(sums / own) for _, own, sums in seen["tokens"]]
    for total, _, sums in seen["tokens"]:
        assert total == pytest.approx(sums / sum(counts), rel=1e-5)
    assert len(set(counts)) == 2, "the case is no case"
    assert torch.is_grad_enabled()
