"""Exported checkpoints are loaded by transformers and peft alone and give the run's own logits; `ask` answers."""

from __future__ import annotations

import json
import os
import socket

import pytest
import torch

from mllm_keeplora.data.media.images import images_of
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.exports.checkpoint import export
from mllm_keeplora.system.files import read_tensors
from tests.integration.processes import command_in_child, run_in_child


@pytest.fixture(scope="module")
def full_projector(settings, tmp_path_factory):
    """A run that trains the projector itself and remembers factors."""
    output = tmp_path_factory.mktemp("exports") / "full"
    assert run_in_child(settings(output, adapters={"projector": "full", "history": "factors"})) == 0
    return output


def questions(saved):
    records = saved.benchmark.test_records("Beta")[:4]
    return saved.base.prompt.question_batch(records, [images_of(record) for record in records])


def own_logits(saved, after):
    model = saved.restore(after)
    with torch.no_grad():
        return model(**questions(saved)).logits


def by_transformers(folder, batch):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**batch).logits


def by_peft(saved, folder, batch):
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(saved.config.base.model)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(folder)).eval()(**batch).logits


@pytest.mark.parametrize("kind", ["two", "full_projector"])
@pytest.mark.parametrize("after", [1, 2])
def test_both_forms_give_the_logits_of_the_run(kind, after, request, tmp_path):
    saved = load_run(request.getfixturevalue(kind))
    export(saved, "merged", tmp_path / "merged", after)
    export(saved, "adapter", tmp_path / "adapter", after)
    own, base, batch = own_logits(saved, after), own_logits(saved, 0), questions(saved)
    assert (own - base).abs().max() > 1e-2
    assert torch.allclose(by_transformers(tmp_path / "merged", batch), own, atol=1e-4)
    assert torch.allclose(by_peft(saved, tmp_path / "adapter", batch), own, atol=1e-4)
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] and not settings.get("rank_pattern")
    assert ("modules_to_save" in settings) == (kind == "full_projector")


def test_a_merged_folder_has_a_processor_that_prompts_alike_and_a_card_with_scores(two, tmp_path):
    from transformers import AutoProcessor

    saved = load_run(two)
    export(saved, "merged", tmp_path / "merged")
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    assert processor.chat_template == saved.base.processor.chat_template
    card = (tmp_path / "merged/README.md").read_text()
    results = json.loads((two / "results.json").read_text())
    assert f"| Alpha | {results['score_matrix'][1][0]:.1f} |" in card and "after Alpha, Beta" in card
    assert f"| general | {results['general']['general'][2]:.1f} |" in card
    assert not list(tmp_path.glob("*.part"))


def test_a_merged_folder_has_the_config_of_its_base_and_weights_named_as_on_the_hub(two, world, tmp_path):
    from safetensors import safe_open

    export(two, "merged", tmp_path / "merged")
    assert (tmp_path / "merged/config.json").read_bytes() == (world / "base/config.json").read_bytes()
    with safe_open(tmp_path / "merged/model.safetensors", "pt") as stored:
        assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in set(stored.keys())
    card = (tmp_path / "merged/README.md").read_text()
    assert str(world) not in card.split("Settings of the run")[0] and "base_model:" not in card


def test_an_export_is_asked_as_the_run_was(settings, tmp_path, command):
    """The prompt style is the run's own, which neither the base nor the exported folder names."""
    from mllm_keeplora.config import BaseConfig
    from mllm_keeplora.eval.checkpoints import Checkpoint
    from mllm_keeplora.models.shipped import prompt_style

    values = settings(tmp_path / "run", ("Alpha",))
    values["base"]["prompt"] = "llava_mistral"
    assert run_in_child(values) == 0
    for form in ("merged", "adapter"):
        export(tmp_path / "run", form, tmp_path / form)
    assert prompt_style(BaseConfig(model=str(tmp_path / "merged"))) == "llava_mistral"
    assert Checkpoint.named(tmp_path / "adapter").config("mini_dcl", tmp_path / "out").base.prompt == "llava_mistral"
    assert prompt_style(BaseConfig(model="llava-hf/llava-1.5-7b-hf")) == "vicuna_v1"  # a shipped base by its hub id


def test_an_export_wants_the_weights_that_the_run_was_made_with(two, world, tmp_path):
    import shutil

    copied = tmp_path / "run"
    shutil.copytree(two, copied)
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace(str(world / "base"), str(world / "other_base")))
    with pytest.raises(UserError, match="other weights"):
        export(copied, "merged", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_weights_are_stored_in_the_dtype_of_the_base(two, world, tmp_path, monkeypatch):
    from transformers import AutoConfig

    read = AutoConfig.from_pretrained

    def in_half(*args, **options):
        config = read(*args, **options)
        if not isinstance(config, tuple):  # as export asks; transformers itself gets it with what is left over
            config.dtype = torch.bfloat16
        return config

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", in_half)
    export(load_run(two), "merged", tmp_path / "half")
    stored = read_tensors(tmp_path / "half/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_an_exported_checkpoint_is_evaluated_like_the_run(two, world, tmp_path, command, settings):
    import yaml

    export(load_run(two), "merged", tmp_path / "merged")
    benchmark = tmp_path / "tiny.yaml"
    benchmark.write_text(yaml.safe_dump(settings(tmp_path / "unused")["benchmark"]))
    said = command(
        "eval", tmp_path / "merged", "--benchmark", benchmark, "--domains", "Beta", "--output", tmp_path / "e"
    )
    expected = json.loads((two / "results.json").read_text())["score_matrix"][1][1]
    assert said.code == 0 and said.out.split() == ["Beta", f"{expected:.2f}"]


def test_what_cannot_be_exported_is_told_and_leaves_nothing(two, tmp_path, command):
    said = command("export", two, tmp_path / "x", "--to", "onnx")
    assert said.code == 2 and "--to must be merged or adapter, got 'onnx'" in said.err
    said = command("export", two, tmp_path / "x", "--after", 3)
    assert said.code == 2 and "--after must be between 0 and 2" in said.err
    said = command("export", two, tmp_path / "x", "--after", 0, "--to", "adapter")
    assert said.code == 2 and "nothing to put into an adapter" in said.err
    assert not list(tmp_path.iterdir())
    (tmp_path / "x").mkdir()
    said = command("export", two, tmp_path / "x")
    assert said.code == 2 and "exists already" in said.err


def test_a_cut_checkpoint_is_refused(two, tmp_path, monkeypatch):
    from mllm_keeplora.system import files

    write = files.write_tensors
    monkeypatch.setattr(
        files, "write_tensors", lambda path, tensors, *more: write(path, dict(list(tensors.items())[:3]))
    )
    with pytest.raises(RuntimeError, match="numbers were written"):
        export(load_run(two), "adapter", tmp_path / "cut")
    assert not list(tmp_path.iterdir())


# -- ask -------------------------------------------------------------------------------------------------------------


def test_ask_answers_as_the_run_does(two, command):
    saved = load_run(two)
    record = saved.benchmark.test_records("Beta")[0]
    stored = json.loads((two / "domains/02_Beta/predictions/Beta.jsonl").read_text().splitlines()[0])
    said = command("ask", two, "--image", record.media[0].path, record.question, "--max-new-tokens", 3)
    assert (said.code, said.out.strip()) == (0, stored["prediction"])


def test_ask_takes_an_exported_adapter_and_tells_what_is_wrong(two, tmp_path, command):
    saved = load_run(two)
    record = saved.benchmark.test_records("Beta")[0]
    picture, question = record.media[0].path, record.question
    export(saved, "adapter", tmp_path / "adapter")
    own = command("ask", two, "--image", picture, question)
    assert command("ask", tmp_path / "adapter", "--image", picture, question).out == own.out
    said = command("ask", two, "--image", tmp_path / "none.png", question)
    assert said.code == 2 and "none.png" in said.err
    said = command("ask", two, "--image", picture, "<image> or <image> ?")
    assert said.code == 2 and "2 image marks, but 1 pictures" in said.err
    said = command("ask", tmp_path / "adapter", "--after", 1, question)
    assert said.code == 2 and "no --after" in said.err


def test_what_a_killed_export_left_is_removed_by_the_next(two, tmp_path):
    kill = ("mllm_keeplora.exports.checkpoint:_describe", 1)
    assert command_in_child("export", two, tmp_path / "out", "--to", "adapter", kill=kill).code == -9
    (tmp_path / f"out.{os.getpid()}@{socket.gethostname()}.part").mkdir()  # somebody is at work
    (tmp_path / "out.1@elsewhere.part").mkdir()  # nobody here can know
    assert len(list(tmp_path.iterdir())) == 3
    export(two, "adapter", tmp_path / "other")
    assert len(list(tmp_path.iterdir())) == 4
    (tmp_path / f"out.{os.getpid()}@{socket.gethostname()}.part").rename(tmp_path / "out.999999999.part")
    export(two, "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"other", "out", "out.1@elsewhere.part"}
