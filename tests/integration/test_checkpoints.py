"""Asking what is not a run: a base, a merged model, an adapter; grading answers again; looking at a record."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from mllm_keeplora import load_run
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval import harness
from mllm_keeplora.eval.checkpoints import Checkpoint, evaluate_checkpoint
from mllm_keeplora.system import files


@pytest.fixture
def benchmark(settings, tmp_path):
    """The benchmark of the tiny runs as a file of its own."""
    path = tmp_path / "tiny_benchmark.yaml"
    values = settings(tmp_path / "unused")["benchmark"]
    path.write_text(yaml.safe_dump(values))
    return path


def answers(folder, name):
    return [row["prediction"] for row in files.read_json_lines(folder / "predictions" / f"{name}.jsonl")]


def test_a_base_a_merged_model_and_an_adapter_answer_as_the_run_did(two, world, benchmark, tmp_path, command):
    run = load_run(two)
    model, processor = run.load(after=1)
    model.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    adapter = tmp_path / "apart"
    shutil.copytree(two / "domains" / "01_Alpha" / "adapter", adapter)
    for name, words, unit in (
        ("base", [world / "base"], "00_base"),
        ("merged", [tmp_path / "merged"], "01_Alpha"),
        ("adapter", [adapter, "--base", world / "base"], "01_Alpha"),
    ):
        out = tmp_path / name
        said = command("eval", *words, "--benchmark", benchmark, "--output", out, "--batch-size", 4)
        assert said.code == 0, said.err
        for domain in ("Alpha", "Beta"):
            stored = next(two.glob(f"domains/{unit}/predictions/{domain}.jsonl"))
            assert answers(out, domain) == [row["prediction"] for row in files.read_json_lines(stored)], (name, domain)
        told = json.loads((out / "scores.json").read_text("utf-8"))
        assert told["sets"]["Alpha"]["batch_size"] == 4 and not list(out.rglob("*.part"))


def test_an_adapter_whose_tensors_have_other_names_is_refused(two, world, benchmark, tmp_path, command):
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "renamed"
    shutil.copytree(two / "domains" / "01_Alpha" / "adapter", adapter)
    path = adapter / "adapter_model.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path)
    said = command("eval", adapter, "--base", world / "base", "--benchmark", benchmark, "--output", tmp_path / "out")
    assert said.code == 2 and "places stay empty" in said.err


def test_a_checkpoint_is_asked_what_a_run_asks_by_the_runs_yaml(world, settings, tmp_path, command):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "run", ("Beta",), eval={"limit": 3})))
    said = command("eval", world / "base", "--benchmark", tmp_path / "run.yaml", "--output", tmp_path / "out")
    assert said.code == 0, said.err
    told = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))
    assert {name: each["questions"] for name, each in told["sets"].items()} == {"Beta": 3, "general": 8}


def test_a_folder_keeps_the_sets_of_one_model_and_refuses_another(world, benchmark, tmp_path):
    first, other = Checkpoint.named(world / "base"), Checkpoint.named(world / "other_base")
    for domain in ("Alpha", "Beta"):
        evaluate_checkpoint(first, str(benchmark), tmp_path / "out", [domain], ["eval.batch_size=8"])
    told = json.loads((tmp_path / "out" / "scores.json").read_text("utf-8"))
    assert set(told["sets"]) == {"Alpha", "Beta"}
    with pytest.raises(UserError, match="answers of another model"):
        evaluate_checkpoint(other, str(benchmark), tmp_path / "out", ["Alpha"], ["eval.batch_size=8"])


def test_an_interrupted_evaluation_of_a_checkpoint_asks_nothing_twice(world, benchmark, tmp_path, monkeypatch):
    asked = []
    real = harness.generate

    def counted(*arguments):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append([record.id for record in arguments[2]])
        return real(*arguments)

    checkpoint, overrides = Checkpoint.named(world / "base"), ["eval.batch_size=4"]
    whole = evaluate_checkpoint(checkpoint, str(benchmark), tmp_path / "whole", ["Alpha", "Beta"], overrides)
    monkeypatch.setattr(harness, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(checkpoint, str(benchmark), tmp_path / "cut", ["Alpha", "Beta"], overrides)
    first, asked[:] = len(asked), []
    monkeypatch.setattr(harness, "generate", lambda *a: asked.append(1) or real(*a))
    again = evaluate_checkpoint(checkpoint, str(benchmark), tmp_path / "cut", ["Alpha", "Beta"], overrides)
    assert first + len(asked) == 4 and again == whole
    for name in ("Alpha", "Beta"):
        one, other = (tmp_path / folder / "predictions" / f"{name}.jsonl" for folder in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{base}"], "is not a run directory; to ask a model or an adapter, name a --benchmark"),
        (["{base}", "--benchmark", "{benchmark}", "--after", "1"], "there is no --after"),
        (["{two}", "--benchmark", "{benchmark}"], "there is no --benchmark"),
        (["{base}", "--benchmark", "{benchmark}", "--base", "x"], "--base is for adapters"),
        (["{adapter}", "--benchmark", "{benchmark}"], "names no base model; say which with --base"),
        (["{adapter}", "--benchmark", "{benchmark}", "--base", "{other}"], "does not fit"),
        (["{part}", "--benchmark", "{benchmark}", "--base", "{base}"], "one domain's part of a run"),
        (["{base}", "--benchmark", "{benchmark}", "--domains", "Delta"], "no domain or suite 'Delta'"),
        (["{base}", "--benchmark", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_asked_is_refused(words, message, two, world, benchmark, tmp_path, command):
    from tests.support.tiny import write_tiny_llava

    other, adapter = tmp_path / "wider", tmp_path / "apart"
    shutil.copytree(two / "domains" / "01_Alpha" / "adapter", adapter)
    if "{other}" in words:
        write_tiny_llava(other, hidden=64)
    places = {"base": world / "base", "two": two, "benchmark": benchmark, "other": other,
              "adapter": adapter, "part": two / "domains" / "01_Alpha" / "adapter"}  # fmt: skip
    said = command("eval", *(word.format(**places) for word in words), "--output", tmp_path / "out")
    if "{two}" in words:
        said = command("eval", *(word.format(**places) for word in words))
    assert said.code == 2 and message in said.err, said.err


def test_stored_answers_are_graded_again_without_a_model(two, tmp_path, command, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(two, run)
    path = run / "domains" / "02_Beta" / "predictions" / "Alpha.jsonl"
    rows = files.read_json_lines(path)
    files.write_json_lines(path, [{**row, "score": 0.3} for row in rows])
    monkeypatch.setattr("mllm_keeplora.eval.saved.load_base", lambda *a: pytest.fail("a model was loaded"))
    said = command("rescore", run)
    assert said.code == 0 and "1 scores moved" in said.out and "Alpha: 30.00 ->" in said.out, said.out + said.err
    assert files.read_json_lines(path) == rows
    before, after = (json.loads((folder / "results.json").read_text()) for folder in (two, run))
    assert before["score_matrix"] == after["score_matrix"]
    files.write_json_lines(path, rows[1:])
    said = command("rescore", run)
    assert said.code == 2 and "answers other questions" in said.err


def test_a_record_is_shown_as_the_model_will_see_it(settings, tmp_path, command):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(tmp_path / "out")))
    said = command("check", config, "--show", "Beta/1")
    assert said.code == 0, said.err
    assert "Beta/train.json record 1" in said.out and "trained (green)" in said.out and "32 x 32 pixels" in said.out
    assert "[<image> x 4]" in said.out and "where is the square" in said.out and "pixel values" in said.out
    for wrong, message in (("Delta/0", "DOMAIN/N"), ("Beta/99", "numbered from 0"), ("Beta/x", "DOMAIN/N")):
        said = command("check", config, "--show", wrong)
        assert said.code == 2 and message in said.err
    assert not (tmp_path / "out").exists()
