"""A saved run gives its model back: plain transformers objects, independent of one another, as the run asked them."""

from __future__ import annotations

import json

import torch

from mllm_keeplora import load_run
from mllm_keeplora.adapters import Factors


def test_loaded_models_are_pristine_base_plus_the_deltas_of_their_units(two):
    run = load_run(two)
    base, _ = run.load(after=0)
    first, _ = run.load(after=1)
    both, _ = run.load()
    factors = [Factors.load(two / "domains" / unit / "adapter") for unit in ("01_Alpha", "02_Beta")]
    assert type(both).__name__ == "LlavaForConditionalGeneration"
    for layer in factors[0].A:
        pristine = base.get_submodule(layer).weight
        after_one = pristine + factors[0].delta(layer)
        assert torch.allclose(first.get_submodule(layer).weight, after_one, atol=1e-6)
        assert torch.allclose(both.get_submodule(layer).weight, after_one + factors[1].delta(layer), atol=1e-6)
        assert not torch.equal(first.get_submodule(layer).weight, pristine)


def test_a_loaded_model_answers_as_the_run_recorded(two):
    run = load_run(two)
    model, processor = run.load(after=2)
    rows = [json.loads(line) for line in (two / "domains/02_Beta/predictions/Beta.jsonl").read_text().splitlines()]
    records = {record.id: record for record in run.benchmark.test_records("Beta")}
    from mllm_keeplora.data.media.images import images_of
    from mllm_keeplora.models import ChatPrompt

    prompt = ChatPrompt(processor)
    answers = []
    for row in rows:
        batch = prompt.question_batch([records[row["id"]]], [images_of(records[row["id"]])])
        tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)
        answers += prompt.answers(tokens[:, batch["input_ids"].shape[1] :])
    assert answers == [row["prediction"] for row in rows]
