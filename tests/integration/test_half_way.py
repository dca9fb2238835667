"""A run that an older version left half-way goes on, and is asked, exported and reported, as if it were today's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mllm_keeplora.system import files
from tests.integration.processes import run_in_child
from tests.support.half_way import ROOT, half_way_config

FIXTURE = Path(__file__).parents[1] / "fixtures" / "half_way"
BETA = "domains/02_Beta"


@pytest.fixture(scope="module")
def continued(tmp_path_factory) -> Path:
    """A folder with the fixture's base, data and run, which was continued to its end."""
    folder = tmp_path_factory.mktemp("old") / "half_way"
    shutil.copytree(FIXTURE, folder)
    for path in (folder / "run/run.json", folder / "run/config.yaml"):
        path.write_text(path.read_text().replace(ROOT, str(folder)))
    before = files.read_json(folder / "run/run.json")["stages"]
    assert f"{BETA[8:]}/gradient" in before and f"{BETA[8:]}/train" not in before
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # killed once more in its training, for what the checkpoint there says
        kill = ("mllm_keeplora.training.fit:Reporter.on_step_end", 5)
        assert run_in_child(half_way_config(), kill=kill) < 0
        shutil.copy(folder / f"run/{BETA}/checkpoints/checkpoint-4/complete.json", folder / "complete.json")
        assert run_in_child(half_way_config()) == 0
    after = files.read_json(folder / "run/run.json")["stages"]
    assert {stage: after[stage] for stage in before} == before  # nothing was done again
    return folder


def test_a_checkpoint_belongs_to_the_same_training_as_before(continued):
    assert files.read_json(continued / "complete.json") == files.read_json(FIXTURE / "expected/complete.json")


def test_factors_and_bases_are_those_that_the_older_version_ends_with(continued):
    found = files.read_tensors(continued / f"run/{BETA}/adapter/adapter_model.safetensors")
    wanted = files.read_tensors(FIXTURE / "expected/adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    found, wanted = (files.read_tensors(path) for path in (
        continued / f"run/{BETA}/basis.safetensors", FIXTURE / "expected/basis.safetensors"))  # fmt: skip
    for layer, columns in wanted.items():
        spans = [each.double() @ each.double().mT for each in (found[layer], columns)]
        torch.testing.assert_close(*spans, rtol=0, atol=1e-3)


def test_predictions_and_results_are_those_that_the_older_version_ends_with(continued):
    for path in sorted((FIXTURE / "expected/predictions").iterdir()):
        assert (continued / f"run/{BETA}/predictions" / path.name).read_text() == path.read_text(), path.name
    found, wanted = (json.loads(path.read_text()) for path in (
        continued / "run/results.json", FIXTURE / "expected/results.json"))  # fmt: skip
    varying = {"wall_seconds", "peak_memory_bytes", "environment"}
    assert {key: value for key, value in found.items() if key not in varying} == {
        key: value for key, value in wanted.items() if key not in varying
    }


def test_it_is_asked_exported_and_reported(continued, command, tmp_path, monkeypatch):
    monkeypatch.chdir(continued)
    scores = files.read_json(continued / "run/results.json")["score_matrix"]
    said = command("eval", "run", "--after", "1", "--domains", "Alpha,Beta")
    assert said.code == 0, said.err
    assert [float(line.split()[-1]) for line in said.out.splitlines()] == pytest.approx(scores[0], abs=0.005)
    assert command("rescore", "run").code == 0
    for form in ("merged", "adapter"):
        assert command("export", "run", tmp_path / form, "--to", form).code == 0
        assert list((tmp_path / form).glob("*.safetensors"))
    assert command("report", "run").code == 0
    assert (continued / "run/report.html").read_text().count("Alpha") > 5
    assert command("inspect", "run").code == 0
