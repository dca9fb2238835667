"""Routers that published presets choose, in whole runs: stopped and resumed, in two processes, asked from files."""

from __future__ import annotations

import pytest
import torch

from mllm_keeplora.eval.harness import generate
from mllm_keeplora.eval.rows import asked_records
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.strategies.mixture.routed import Routed
from mllm_keeplora.system import files
from tests.integration.processes import differing, leftovers, run_in_child, run_on_two

STATISTICS = "mllm_keeplora.strategies.mixture.routed:Routed.after_domain"


def config_of(settings, output, preset, **changes):
    """Weights are divided in evaluations, too, where the engine divides any."""
    values = settings(output, **changes)
    values["strategy"] = {"name": "routed", "preset": preset, "rank": 4, "alpha": 8}
    return {**values, "eval": {**values["eval"], "weights": "divided"}}


@pytest.mark.slow
@pytest.mark.parametrize("preset", Routed.presets)
def test_a_run_by_a_published_router_ends_alike_however_it_runs(preset, settings, tmp_path):
    whole, stopped, divided = (tmp_path / name for name in ("whole", "stopped", "divided"))
    assert run_in_child(config_of(settings, whole, preset)) == 0
    assert run_in_child(config_of(settings, stopped, preset), (STATISTICS, 2)) < 0
    assert run_in_child(config_of(settings, stopped, preset)) == 0
    assert differing(whole, stopped) == [] and leftovers(stopped) == []
    ends = run_on_two(config_of(settings, divided, preset, deepspeed="zero3"), tmp_path)
    assert [(end.code, end.err[-4000:] if end.code else "") for end in ends] == [(0, "")] * 2
    one, other = (files.read_tensors(run / "domains/02_Beta/mixer.safetensors") for run in (whole, divided))
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4) for name in one)

    saved = load_run(whole)
    records, part = asked_records(saved.benchmark, "Alpha", saved.config)[:4], saved.benchmark.graded("Alpha")
    model, unit = saved.restore(2), saved.run.finished_units[-1]
    answers = generate(saved.base, model, records, [part.suffix_for(record) for record in records], 8)
    rows = files.read_json_lines(saved.run.folder(unit).predictions("Alpha"))
    told = {row["id"]: row["prediction"] for row in rows}
    assert [answer.text for answer in answers] == [told[record.id] for record in records]
