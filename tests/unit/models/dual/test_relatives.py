"""MetaCLIP 2, AltCLIP, Chinese-CLIP, SigLIP 2 and ALIGN: what differs from CLIP in towers, texts and temperatures."""

from __future__ import annotations

import pytest
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.checks.classes import padding_faults
from mllm_keeplora.config import BaseConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.models import load_base
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.probes.gradients import collect_mean_gradients
from mllm_keeplora.strategies.subspace.keeplora import KeepLoRA, KeepLoRAOptions
from tests.oracles import subspace
from tests.support.keeplora import columns_of, context_of, fit, modules_of
from tests.support.strategies import open_branch
from tests.support.tiny_dual import RELATIVES
from tests.unit.conftest import snapshot

BLOCKS = {"vision": 3, "text": 2}


@pytest.fixture(scope="module", params=RELATIVES)
def folder(request, tmp_path_factory):
    return RELATIVES[request.param](tmp_path_factory.mktemp("relatives") / request.param)


@pytest.fixture
def base(folder):
    return load_base(BaseConfig(model=str(folder)), "frozen")


def sees_by_convolutions(base):
    return base.model.config.model_type == "align"


def test_attention_of_every_block_is_adapted_where_a_tower_has_it(base):
    towers = {tower: 4 * count for tower, count in BLOCKS.items()}
    if sees_by_convolutions(base):
        towers["vision"] = 0
    assert {tower: len(layers) for tower, layers in base.parts.tower_layers.items()} == towers
    depths = {base.parts.depth(layer) for layer in base.parts.tower_layers["text"]}
    assert depths == {0, 1}


def test_gradients_are_those_of_the_models_own_logits(base, records):
    some = records["Alpha"][:6]
    layers = modules_of(base)
    batches = map(base.family.training_batch, (some[:4], some[4:]))
    found = collect_mean_gradients(base.family, base.model, layers, batches)
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    batch = base.family.training_batch(some)
    loss = torch.nn.functional.cross_entropy(base.model(**inputs_of(batch)).logits_per_image, batch["labels"])
    for (name, gradient), wanted in zip(found.items(), torch.autograd.grad(loss, weights), strict=True):
        assert (gradient.mean - wanted).norm() < 2e-3 * wanted.norm(), name  # pictures of one colour are much alike


def test_texts_are_trimmed_only_where_that_changes_nothing(base, records):
    batch = base.family.training_batch(records["Alpha"][:3])
    if base.model.config.model_type == "siglip2":
        assert batch["input_ids"].shape[1] == base.family.texts.positions and "attention_mask" not in batch
        return
    more = base.family.texts.positions - batch["input_ids"].shape[1]
    assert more > 0
    whole = {name: torch.nn.functional.pad(batch[name], (0, more)) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        found, wanted = (base.model(**inputs_of(each)).logits_per_image for each in (batch, {**batch, **whole}))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_answers_are_the_likeliest_by_the_models_own_logits(base, records):
    some = records["Alpha"][:6]
    with torch.inference_mode(), base.family.asking(False):
        answers = base.family.answers(base.model, base.family.question_batch(some), 1, lambda rows: None)
        shares = base.model(**inputs_of(base.family.training_batch(some))).logits_per_image.softmax(dim=1)
    for answer, own in zip(answers, shares, strict=True):
        assert answer.probability == pytest.approx(float(own.max()), rel=1e-4)
        assert answer.is_close or answer.text == some[0].classes.names[int(own.argmax())]


def test_keeplora_learns_and_leaves_all_but_its_branch_as_it_was(base, records, tmp_path):
    """Batch norms of a frozen tower, too, whose means over batches are no parameters."""
    before, kept, strategy = snapshot(base.model), {}, KeepLoRA(KeepLoRAOptions(rank=2, alpha=4.0, energy_weights=0.4))
    adapters = Adapters(base, "factors", 0.0)
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    context = context_of(base, adapters, kept, records["Alpha"])
    open_branch(strategy, context)
    first = columns_of(kept)
    fit(strategy, context, tmp_path)
    strategy.after_domain(context)
    factors = adapters.read()
    assert factors.B.keys() == set(base.parts.target_layers) and any(B.any() for B in factors.B.values())
    assert all(subspace.leak(factors.delta(layer).numpy(), first[layer]) < 1e-5 for layer in factors.B)
    adapters.restore([], [])
    assert all(torch.equal(value, before[name]) for name, value in snapshot(base.model).items())
    assert not any(module.training for module in base.model.modules())


@pytest.mark.parametrize("folder", ["align"], indirect=True)
def test_options_of_a_tower_without_adapters_are_refused(base):
    for options, told in (
        ({"layer_scale_towers": ("vision",)}, r"layer_scale_towers: the base has no vision; it has text"),
        ({"thresholds": {"^vision_model": {"energy_weights": 0.8}}}, r"'\^vision_model' matches none of 8 layers"),
    ):
        strategy = KeepLoRA(KeepLoRAOptions(**options))
        with pytest.raises(UserError, match=told):
            strategy.prepare(context_of(base, Adapters(base, "merged", 0.0), {}, [], -1))


def test_padding_counts_in_features_only_where_it_changes_no_text(base, records):
    kind = base.model.config.model_type
    texts = base.family.texts
    assert (texts.causal, texts.full) == (kind == "metaclip_2", kind.startswith("siglip"))
    asked, left = KeepLoRAOptions(feature_padding=True), KeepLoRAOptions()
    assert list(padding_faults(left, texts)) == [] and list(padding_faults(None, texts)) == []
    told = list(padding_faults(asked, texts))
    assert len(told) == (0 if texts.causal or texts.full else 1)
    assert all(each.startswith("strategy.feature_padding is true, but the text tower of this base") for each in told)
    batch = base.family.training_batch(records["Alpha"][:3])
    own = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
    with torch.no_grad():
        plain = base.model.text_model(**own).last_hidden_state
        filled = base.model.text_model(**texts.padded(batch)).last_hidden_state[:, : plain.shape[1]]
    real = own.get("attention_mask", torch.ones_like(own["input_ids"])).bool()
    assert torch.allclose(plain[real], filled[real], atol=1e-5) == (not told)
