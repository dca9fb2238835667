"""A base in 4 or 8 bits: every stage runs on a CPU, nothing of the base changes, and what was learnt stays factors."""

from __future__ import annotations

import json

import pytest
import torch

from mllm_keeplora.adapters.stored import past_of
from mllm_keeplora.config import BaseConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.exports.checkpoint import export
from mllm_keeplora.models import load_base
from tests.integration.processes import run_in_child

pytest.importorskip("bitsandbytes")


KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


@pytest.fixture(scope="module", params=KINDS)
def quantised(request, settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("quantised") / request.param
    values = settings(output)
    values["base"]["quantization"] = request.param
    assert run_in_child(values) == 0
    return output


def test_every_stage_runs_on_a_quantised_base(quantised):
    results = json.loads((quantised / "results.json").read_text())
    assert results["complete"] and results["settings"]["base.quantization"] == quantised.name
    changes = json.loads((quantised / "domains/02_Beta/diagnostics.json").read_text())["changes"]
    assert len(changes) == 16
    for layer, facts in changes.items():
        assert 0 < facts["update"] < 10, layer
        assert facts["leak"] < 1e-5 and facts["leak_evaluated"] < 1e-5, layer


@pytest.mark.parametrize("quantization", KINDS)
def test_the_language_model_is_quantised_and_tower_projector_and_head_are_not(world, quantization):
    base = load_base(BaseConfig(model=str(world / "base"), quantization=quantization), "keeplora")
    kinds = {layer: type(base.model.get_submodule(layer)).__name__ for layer in base.parts.target_layers}
    assert {kinds[layer] for layer in base.parts.language_layers} == {KINDS[quantization]}
    assert {kinds[layer] for layer in base.parts.projector_layers} == {"Linear"}
    assert type(base.model.get_output_embeddings()).__name__ == "Linear"


def test_a_saved_run_answers_from_factors_beside_the_packed_weights(quantised):
    saved = load_run(quantised)
    assert saved.adapters.mode == "factors"
    layer = saved.base.parts.language_layers[0]
    packed = saved.base.model.get_submodule(layer).weight.clone()
    saved.restore(2)
    module = saved.adapters.base.get_submodule(layer)
    assert torch.equal(getattr(module, "base_layer", module).weight, packed)


def test_an_export_puts_what_was_learnt_on_the_weights_as_they_were_before(quantised, world, tmp_path):
    from transformers import AutoModelForImageTextToText

    saved = load_run(quantised)
    export(saved, "merged", tmp_path / "merged")
    pristine = AutoModelForImageTextToText.from_pretrained(world / "base")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert not getattr(merged, "is_quantized", False)
    past = past_of(saved.run, saved.first(None)).factors
    for layer in saved.base.parts.target_layers:
        change = merged.get_submodule(layer).weight - pristine.get_submodule(layer).weight
        assert torch.allclose(change, sum(factors.delta(layer) for factors in past), atol=1e-6), layer


def test_merging_into_quantised_weights_is_refused(settings, tmp_path, command):
    from mllm_keeplora.checks.run import check_run
    from mllm_keeplora.config import parse_config

    values = settings(tmp_path / "run", adapters={"history": "merged"})
    values["base"]["quantization"] = "nf4"
    with pytest.raises(UserError, match=r"adapters\.history is merged"):
        check_run(parse_config(values, "test"))
