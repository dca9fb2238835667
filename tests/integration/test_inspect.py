"""What a run tells about itself: diagnostics against the run's own files, the terminal tables, the page."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters.stored import kept_of, past_of
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.report.page import unit_facts
from mllm_keeplora.report.render.diagnostics import inspection_figures
from mllm_keeplora.report.render.html import render_html
from mllm_keeplora.runs import RunDir
from tests.oracles import subspace
from tests.unit.conftest import captured_tokens, encode


@pytest.fixture(scope="module")
def saved(two):
    return load_run(two)


@pytest.fixture(scope="module")
def beta(two):
    return json.loads((two / "domains/02_Beta/diagnostics.json").read_text())


def test_capacity_counts_the_stored_columns(saved, beta):
    kept = kept_of(saved.run, saved.run.units)
    assert beta["capacity"].keys() == kept.keys()
    for layer, facts in beta["capacity"].items():
        assert len(facts["parts"]) == 3
        assert (sum(facts["parts"]), facts["free"]) == (kept[layer].rank, kept[layer].d_in - kept[layer].rank)


def test_leak_and_update_are_those_of_the_stored_factors(saved, beta):
    before = kept_of(saved.run, saved.run.units[:1])
    factors = past_of(saved.run, saved.run.units).factors[-1]
    for layer, facts in beta["changes"].items():
        delta, weight = factors.delta(layer).numpy(), saved.base.model.get_submodule(layer).weight.detach().numpy()
        assert facts["update"] == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(weight), rel=1e-4)
        assert facts["leak"] == pytest.approx(subspace.leak(delta, before[layer].columns.numpy()), abs=1e-7)
        assert facts["leak"] < 1e-5 and facts["leak_evaluated"] < 1e-5 < facts["leak_bfloat16"], layer


def test_interference_and_overlap_are_means_over_the_inputs_of_a_set(saved, beta, world):
    assert list(beta["inputs"]) == ["Alpha", "Beta", "general"]
    model = saved.restore(2)
    records = saved.benchmark.train_records("Alpha")
    layers = {layer: saved.base.model.get_submodule(layer) for layer in saved.base.parts.target_layers}
    tokens = captured_tokens(model, layers, [encode(saved.base, [record]) for record in records])
    factors, kept = past_of(saved.run, saved.run.units).factors[-1], kept_of(saved.run, saved.run.units)
    for layer, facts in beta["inputs"]["Alpha"].items():
        rows = torch.as_tensor(tokens[layer]).float()
        change = (rows @ factors.delta(layer).T).norm(dim=1)
        output = layers[layer](rows).detach().norm(dim=1)
        assert facts["interference"] == pytest.approx(float((change / output).mean()), rel=1e-3), layer
        parts = kept[layer].columns.split(beta["capacity"][layer]["parts"], dim=1)
        expected = [float((rows @ columns).square().sum() / rows.square().sum()) for columns in parts]
        assert facts["covered"] == pytest.approx(expected, abs=1e-4), layer


def test_inspect_prints_every_table(two, command):
    said = command("inspect", two)
    assert said.code == 0
    for title in ("Capacity", "Gradient", "Updates", "Interference", "Overlap", "domains left"):
        assert title in said.out


def test_inspect_refuses_a_run_that_finished_nothing(two, tmp_path, command):
    ledger = json.loads((two / "run.json").read_text())
    ledger["stages"] = {}
    (tmp_path / "run.json").write_text(json.dumps(ledger))
    said = command("inspect", tmp_path)
    assert said.code == 2 and "finished no domain" in said.err


def test_the_page_of_a_run_shows_the_diagnostics(two):
    drawn = inspection_figures(unit_facts(RunDir(two).load()))
    titles = ["Capacity", "Gradient", "Interference", "Overlap", "Update by depth"]
    assert [title for title, *_ in drawn] == titles
    page = render_html(json.loads((two / "results.json").read_text()), diagnosed=drawn)
    assert all(f'<img alt="{title}"' in page for title in titles)
