"""Whatever command a base is given to, its own code is not run, even where somebody answers yes; nothing calls home."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.exports.checkpoint import export
from tests.integration.processes import command_in_child
from tests.integration.test_wrong_inputs import assert_refused
from tests.support.hostile import HOSTILE, MARK, edited, write_hostile

CUSTOM = "needs code that comes with it, which is not run"


@pytest.fixture(autouse=True)
def says_yes(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))


@pytest.fixture(scope="module")
def exported(two, tmp_path_factory) -> dict[str, Path]:
    """A run exported as a merged folder and as an adapter. Read only."""
    folder = tmp_path_factory.mktemp("exported")
    for form in ("merged", "adapter"):
        export(load_run(two), form, folder / form)
    return {form: folder / form for form in ("merged", "adapter")}


@pytest.fixture
def run_file(settings, tmp_path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path / "out")))
    return path


@pytest.fixture
def picture(world) -> Path:
    return world / "data" / "Alpha" / "images" / "test_0.png"


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("name", ["run", "check"])
def test_a_folder_with_code_is_refused_as_a_base(name, kind, world, run_file, tmp_path, command):
    folder = write_hostile(world / "base", tmp_path / "base", kind)
    assert_refused(command(name, run_file, f"base.model={folder}"), CUSTOM, "base.trust_remote_code")
    assert not (tmp_path / MARK).exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_exported_folder_with_code_is_refused_by_ask_and_eval(kind, exported, picture, run_file, tmp_path, command):
    folder = write_hostile(exported["merged"], tmp_path / "merged", kind)
    assert_refused(command("ask", folder, "what ?", "--image", picture), CUSTOM)
    asked = command("eval", folder, "--benchmark", run_file, "--output", tmp_path / "scores")
    assert_refused(asked, CUSTOM)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_adapter_for_a_base_with_code_is_refused(kind, exported, world, picture, tmp_path, command):
    base = write_hostile(world / "base", tmp_path / "base", kind)
    assert_refused(command("ask", exported["adapter"], "what ?", "--image", picture, "--base", base), CUSTOM)
    assert not (tmp_path / MARK).exists()


def test_a_run_says_that_it_trusts_a_base_and_is_another_run_by_that(world, run_file, tmp_path, monkeypatch, command):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_hostile(world / "base", tmp_path / "base", "processor")
    trusting = [f"base.model={folder}", "base.trust_remote_code=true"]
    said = command("check", run_file, *trusting)
    assert said.code == 0, said.err
    assert "RUN on this machine" in said.out + said.err and (tmp_path / MARK).exists()


BROKEN = {
    "a missing tensor": (lambda weights: weights.popitem(), "its files lack"),
    "a tensor of another shape": (
        lambda weights: weights.update({min(weights): weights[min(weights)][:1]}),
        "stored as",
    ),
    "a number that is none": (
        lambda weights: weights[max(weights)].view(-1)[0].fill_(float("nan")),
        "holds nan or inf",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_exported_folder_that_is_broken_is_refused_by_ask_and_eval(
    name, exported, picture, run_file, tmp_path, command
):
    edit, part = BROKEN[name]
    folder = shutil.copytree(exported["merged"], tmp_path / "merged")
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert_refused(command("ask", folder, "what ?", "--image", picture), part)
    assert_refused(command("eval", folder, "--benchmark", run_file, "--output", tmp_path / "scores"), part)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert_refused(command("ask", folder, "what ?", "--image", picture), f"{path} is damaged")


@pytest.mark.parametrize("text", ["{", "[]", '{"prompt": 3}', '{"prompt": "chat_template", "image_modes": 1}'])
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_an_exported_folders_notes_that_are_broken_are_refused(form, text, exported, world, picture, tmp_path, command):
    folder = shutil.copytree(exported[form], tmp_path / form)
    (folder / "mllm_keeplora.json").write_text(text)
    assert_refused(command("ask", folder, "what ?", "--image", picture), "mllm_keeplora.json")


def pickled(folder: Path) -> None:
    import torch

    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights[min(weights)].view(-1)[0] = float("inf")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})


ADAPTERS = {
    "pickled": (pickled, "adapter_model.safetensors is missing"),
    "cut": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x09"), "safetensors is damaged"),
    "not finite": (not_finite, "holds nan or inf"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json"),
    "no object": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "adapter_config.json"),
    "another kind": (
        lambda folder: edited(folder, folder, "adapter_config.json", lambda v: v.update(peft_type="WARP")),
        "WARP",
    ),
    "a module to import": (
        lambda folder: edited(
            folder,
            folder,
            "adapter_config.json",
            lambda v: v.update(megatron_config={"a": 1}, megatron_core="antigravity"),
        ),
        "antigravity",
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_broken_adapter_is_refused(name, exported, picture, tmp_path, command):
    edit, part = ADAPTERS[name]
    folder = shutil.copytree(exported["adapter"], tmp_path / "adapter")
    edit(folder)
    assert_refused(command("ask", folder, "what ?", "--image", picture), part)


def test_weights_that_change_while_a_run_rests_are_seen_wherever_they_change(settings, world, two, tmp_path, command):
    base = shutil.copytree(world / "base", tmp_path / "base")
    copied = shutil.copytree(two, tmp_path / "run")
    values = {**settings(copied), "base": {"model": str(base)}}
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace(str(world / "base"), str(base)))
    ledger = copied / "run.json"
    ledger.write_text(ledger.read_text().replace(json.dumps(str(world / "base")), json.dumps(str(base))))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    template = base / "chat_template.jinja"  # which no run had in its fingerprint once
    template.write_text(template.read_text().replace(" : ", " ; "))
    said = command("eval", copied, "--domains", "Alpha")
    assert_refused(said, "has other weights than those that the run was started with")


def test_train_args_that_reach_outside_are_refused_before_anything_runs(run_file, tmp_path, command):
    args = "train.args={push_to_hub: true, output_dir: /elsewhere, resume_from_checkpoint: x}"
    said = command("run", run_file, args)
    assert_refused(said, "train.args.push_to_hub", "train.args.output_dir", "use output", "resume_from_checkpoint")
    said = command("check", run_file, "per_domain={Beta: {train: {args: {fsdp: full_shard}}}}")
    assert_refused(said, "train.args.fsdp", "use deepspeed")
    assert not (tmp_path / "out").exists()


WATCHED = """
import runpy, sys

def watch(event, what):
    if event.startswith("socket.") and event not in ("socket.gethostname",):
        sys.stderr.write(f"SOCKET {event} {what}\\n")

sys.addaudithook(watch)
import mllm_keeplora, mllm_keeplora.training.fit, mllm_keeplora.eval.saved, mllm_keeplora.report.page
sys.argv = ["mllm-keeplora", *sys.argv[1:]]
runpy.run_module("mllm_keeplora", run_name="__main__")
"""


@pytest.mark.slow
def test_importing_and_checking_open_no_socket(run_file):
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
    words = [sys.executable, "-c", WATCHED, "check", str(run_file)]
    said = subprocess.run(
        words, capture_output=True, text=True, env={**environment, "OMP_NUM_THREADS": "1"}, timeout=900
    )
    assert said.returncode == 0, said.stderr
    assert "SOCKET" not in said.stderr, said.stderr


def test_a_real_process_that_is_told_yes_runs_no_code(world, run_file, tmp_path):
    folder = write_hostile(world / "base", tmp_path / "base", "model")
    reading, writing = os.pipe()
    os.write(writing, b"y\n" * 99)
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        said = command_in_child("run", run_file, f"base.model={folder}")
    finally:
        os.dup2(before, 0)
    assert_refused(said, CUSTOM)
    assert not (tmp_path / MARK).exists()
