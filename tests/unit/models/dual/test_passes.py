"""Data passes over both towers: autograd's gradients, moments of the right rows, whatever the batches are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.config import BaseConfig
from mllm_keeplora.data.collate import batches
from mllm_keeplora.models import load_base
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.probes.features import collect_moments, shared_inputs
from mllm_keeplora.probes.gradients import collect_mean_gradients
from mllm_keeplora.probes.questions import question_means
from mllm_keeplora.strategies.mixture.dac import DAC, DACOptions
from tests.oracles import dac as oracle
from tests.support.strategies import context_of, fit, open_branch
from tests.unit.adapters.conftest import adapt


def layers_of(base):
    return {name: base.model.get_submodule(name) for name in base.parts.target_layers}


def passed(base, records, size):
    return (base.family.training_batch(part) for part in batches(records, size))


@pytest.mark.parametrize("size", [1, 3, 16])
def test_mean_gradients_are_those_of_autograd(base, records, size):
    some = records["Alpha"][:8]
    found = collect_mean_gradients(base.family, base.model, layers_of(base), passed(base, some, size))
    weights = {name: layer.weight.requires_grad_(True) for name, layer in layers_of(base).items()}
    batch = base.family.training_batch(some)
    with base.family.supervised(base.model, batch):
        losses, _ = base.family.losses(base.model(**inputs_of(batch)).logits, batch["labels"])
    wanted = dict(zip(weights, torch.autograd.grad(losses.mean(), list(weights.values())), strict=True))
    for name, gradient in found.items():
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(gradient.mean, wanted[name], rtol=1e-4, atol=1e-5 * scale)
    assert {name.split(".")[0] for name in found} == {"vision_model", "text_model"}


def test_rows_are_chosen_by_tower_and_not_by_shape(base, records):
    """A batch of as many pictures as classes, whose texts are as long as a picture has patches."""
    some = records["Alpha"][:8]
    vision = [name for name in base.parts.target_layers if base.family.sees_pictures(name)]
    layers = {name: base.model.get_submodule(name) for name in vision}
    patches = base.family.patches if hasattr(base.model, "visual_projection") else base.family.patches - 1

    def alike(batch):
        ids = torch.nn.functional.pad(batch["input_ids"], (0, max(patches - batch["input_ids"].shape[1], 0)))
        mask = torch.nn.functional.pad(
            batch.get("attention_mask", torch.ones_like(batch["input_ids"])),
            (0, ids.shape[1] - batch["input_ids"].shape[1]),
        )
        return {**batch, "input_ids": ids[:, :patches], "attention_mask": mask[:, :patches]}

    wide = base.model.text_model.embeddings
    wide.position_embedding = torch.nn.Embedding(64, wide.position_embedding.embedding_dim)
    wide.register_buffer("position_ids", torch.arange(64)[None], persistent=False)
    of_four = collect_moments(base.family, base.model, layers, map(alike, passed(base, some, 4)))
    of_three = collect_moments(base.family, base.model, layers, passed(base, some, 3))
    for name in layers:
        assert of_four[name].count == of_three[name].count == 8 * patches
        torch.testing.assert_close(of_four[name].moments, of_three[name].moments, rtol=1e-4, atol=1e-6)


def test_texts_count_alike_however_often_they_are_read(base, records):
    text = [name for name in base.parts.target_layers if not base.family.sees_pictures(name)]
    layers = {name: base.model.get_submodule(name) for name in text}
    once = collect_moments(base.family, base.model, layers, passed(base, records["Alpha"][:8], 8))
    often = collect_moments(base.family, base.model, layers, passed(base, records["Alpha"][:8], 2))
    for name in layers:
        assert often[name].count == 4 * once[name].count
        torch.testing.assert_close(often[name].moments, 4 * once[name].moments)


def test_q_k_and_v_of_a_block_share_their_input(base):
    groups = shared_inputs(base.family, base.model, layers_of(base), base.family.example())
    kinds = [sorted(name.rsplit(".", 1)[-1] for name in group) for group in groups]
    assert sorted(kinds) == [["k_proj", "q_proj", "v_proj"]] * 5 + [["out_proj"]] * 5


@pytest.mark.parametrize("projector", ["frozen", "keeplora"])
def test_questions_are_pictures_that_carry_loss_and_class_texts(dual_folder, records, projector):
    """A picture's rows all count, a text's but the first; behind a tower each has one row."""
    base = load_base(BaseConfig(model=str(dual_folder)), projector)
    batch = base.family.training_batch([*records["Alpha"][:2], records["Alpha"][2].untrained()])
    (counted,), layers, seen = base.family.token_kinds(base.model, batch).values(), layers_of(base), {}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0].detach()}))
        for name, layer in layers.items()
    ]
    found = question_means(base.family, base.model, list(layers), base.parts.projectors, batch)
    for hook in hooks:
        hook.remove()
    assert found.keys() == seen.keys() and len(seen) > 8
    for name, (means, may) in found.items():
        pictures, x = base.family.sees_pictures(name), seen[name].double().numpy()
        for row, tokens in enumerate(x):
            if name.startswith(base.parts.projectors):
                wanted = tokens.reshape(-1)
            else:
                counts = [pictures or bool(place and counted[row, place]) for place in range(len(tokens))]
                wanted = oracle.prompt_mean(tokens, counts)
            assert np.allclose(means[row], wanted, atol=1e-5), name
        assert may.tolist() == ([True, True, False] if pictures else [True] * 4), name


@pytest.mark.parametrize("projector", ["frozen", "keeplora"])
def test_votes_and_routers_that_learn_are_of_every_layer(dual_folder, records, projector, tmp_path):
    base = load_base(BaseConfig(model=str(dual_folder)), projector)
    adapters, strategy = adapt(base), DAC(DACOptions(rank=4, router_grad="straight_through"))
    context = context_of(base, adapters, records, 0)
    open_branch(strategy, context)
    assert len(adapters.trainable()) == 4 * len(adapters.layers)
    before = {layer: adapters.mixer.router(layer).weight.clone() for layer in adapters.layers}
    fit(strategy, context, tmp_path, lr=3e-2)
    assert (
        strategy.counts.sum(dim=1) == 3 * len(records["Alpha"])
    ).all()  # of pictures, and of four texts a batch of 4
    assert not any(torch.equal(adapters.mixer.router(layer).weight, each) for layer, each in before.items())
