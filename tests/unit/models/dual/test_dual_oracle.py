"""Losses, answers, prototypes and features of both towers against the float64 loops of `oracles/dual`.

Towers run on one picture or one text at a time here, texts padded to all positions by the tokenizer itself.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters
from mllm_keeplora.adapters.prototypes import Prototypes
from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.models.dual.losses import HELD, OPEN
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.probes.features import collect_moments
from mllm_keeplora.probes.plans import FeaturePlan
from mllm_keeplora.strategies.subspace.keeplora import KeepLoRAOptions
from tests.oracles import dual as oracle
from tests.support.keeplora import context_of
from tests.support.tiny_dual import PLACES_TEXT

SCALE = 7.0


def tokens_of(base, text):
    """A text at full length, as transformers' own users give it; the towers of SigLIP get no mask."""
    return dict(base.processor.tokenizer(text, padding="max_length", max_length=PLACES_TEXT, return_tensors="pt"))


@torch.no_grad()
def feature_of_text(base, text):
    read = base.model.text_model(**tokens_of(base, text)).pooler_output[0]
    read = base.model.text_projection(read) if hasattr(base.model, "text_projection") else read
    return read.double().numpy()


@torch.no_grad()
def feature_of_picture(base, record):
    pixels = base.family.question_batch([record])["pixel_values"].to(base.model.dtype)
    seen = base.model.vision_model(pixel_values=pixels).pooler_output[0]
    seen = base.model.visual_projection(seen) if hasattr(base.model, "visual_projection") else seen
    return seen.double().numpy()


def label_of(record):
    return record.classes.names.index(record.turns[-1].text)


def slow_logits(base, record, prompts=slice(1), prototypes=None):
    """Logits of one picture over the classes of its list, the bias of SigLIP included."""
    texts = [oracle.class_feature([feature_of_text(base, t) for t in own[prompts]]) for own in record.classes.texts]
    image, bias = feature_of_picture(base, record), float(getattr(base.model, "logit_bias", torch.zeros(())))
    logits = oracle.class_logits(image, texts, float(base.model.logit_scale.detach()), bias)
    return logits if prototypes is None else oracle.with_prototypes(logits, image, prototypes, SCALE)


def hold(base, name, classes, seed=3):
    """Give the base prototypes of no unit length under a name; returns them as an array."""
    width = len(feature_of_text(base, "red"))
    P = 3 * torch.randn(len(classes.names), width, generator=torch.Generator().manual_seed(seed))
    setattr(base.model, HELD, torch.nn.ModuleDict({name: Prototypes(P, classes.digest, SCALE)}))
    return P.double().numpy()


def library_losses(base, records):
    batch = base.family.training_batch(records)
    batch["pixel_values"] = batch["pixel_values"].to(base.model.dtype)
    with base.family.supervised(base.model, batch):
        return base.family.losses(base.model(**inputs_of(batch)).logits, batch["labels"])[0]


# prototypes are of one list
@pytest.mark.parametrize(("mixed", "with_prototypes"), [(False, False), (False, True), (True, False)])
def test_losses_and_gradients_of_both_towers_are_those_of_the_reference(base, records, mixed, with_prototypes):
    """Equation (12), of one list and of two in a batch; gradients by differences along random directions."""
    some = records["Alpha"][:4] + (records["Beta"][:3] if mixed else [])
    base.model.double()
    held = hold(base, OPEN, some[0].classes) if with_prototypes else None

    def slow():
        return [oracle.picture_loss(slow_logits(base, record, prototypes=held), label_of(record)) for record in some]

    np.testing.assert_allclose(library_losses(base, some).detach().numpy(), slow(), rtol=1e-5, atol=1e-6)
    names = [name for name in base.parts.target_layers if ".1." in name and name.endswith(("q_proj", "out_proj"))]
    weights = {name: base.model.get_submodule(name).weight.requires_grad_(True) for name in names}
    found = torch.autograd.grad(library_losses(base, some).sum(), list(weights.values()))
    assert {base.parts.tower(name) for name in names} == {"vision", "text"}
    for (name, weight), gradient in zip(weights.items(), found, strict=True):
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()
        ends = []
        for step in (1e-5, -1e-5):
            weight.data += step * direction
            ends.append(sum(slow()))
            weight.data -= step * direction
        expected = (ends[0] - ends[1]) / 2e-5
        assert abs(expected) > 1e-6, name
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-6), name


@pytest.mark.parametrize("with_prototypes", [False, True])
@pytest.mark.parametrize("ensemble", [False, True])
def test_answers_are_those_of_the_reference(base, records, ensemble, with_prototypes):
    """Prototypes are mixed in at answering; texts are the first of a class, or the unit mean of all."""
    some = records["Alpha"][:6]
    classes = some[0].classes
    held = hold(base, classes.digest, classes) if with_prototypes else None
    batch = base.family.question_batch(some)
    with torch.inference_mode(), base.family.asking(ensemble):
        answers = base.family.answers(base.model, batch, 1, lambda rows: None)
    for record, answer in zip(some, answers, strict=True):
        logits = slow_logits(base, record, slice(None) if ensemble else slice(1), held)
        assert answer.text == classes.names[oracle.likeliest(logits)]
        shares = oracle.softmax(logits)
        assert answer.probability == pytest.approx(shares.max(), rel=1e-4)
        assert answer.second == classes.names[int(np.argsort(shares)[-2])]


@pytest.mark.parametrize("count", [2, 5, 60])
def test_classes_of_one_text_are_told_as_a_tie_that_is_settled_alone(base, records, count):
    """Which of them answers is a matter of rounding, hence of what is computed at once: asked alone it is the same."""
    names = tuple(f"class {number}" for number in range(count))
    same = ClassList((*names, "green"), (*(("the red square",) for _ in names), ("the square , left",)))
    some = [replace(record, classes=same) for record in records["Alpha"][:5]]

    def asked(part):
        with torch.inference_mode(), base.family.asking(False):
            return base.family.answers(base.model, base.family.question_batch(part), 1, lambda rows: None)

    for record, answer, alone in zip(some, asked(some), asked(some[:1]) * 5, strict=True):
        logits = slow_logits(base, record)
        top = {same.names[c] for c in range(len(logits)) if logits.max() - logits[c] < 1e-4}
        assert answer.text in top and answer.is_close == (len(top) > 1)
        assert asked([some[0]])[0] == alone


def starts(base, records, size):
    return context_of(base, Adapters(base, "merged", 0.0), {}, records, probe_batch=size).passes.class_means()


def test_prototypes_start_at_the_means_of_all_pictures_whatever_the_batches(base, records):
    """Of unit length; pictures behind the last whole batch count as the others, in any order."""
    some = records["Alpha"][:11]
    classes = some[0].classes
    features, labels = [feature_of_picture(base, record) for record in some], [label_of(record) for record in some]
    expected = oracle.class_prototypes(features, labels, len(classes.names))
    for of, size in ((some, 4), (some[::-1], 4), (some, 11), (some, 1)):
        P = starts(base, of, size).prototypes(classes.names, classes.digest).P.detach().numpy()
        np.testing.assert_allclose(P, expected, atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(P, axis=1), 1.0, atol=1e-6)
    without_rest = oracle.class_prototypes(features[:8], labels[:8], len(classes.names))
    assert np.abs(without_rest - expected).max() > 1e-3, "else the rest would prove nothing"


@pytest.mark.parametrize("padding", [False, True])
def test_features_of_texts_are_rows_up_to_the_end_mark_or_all(base, records, padding):
    """`feature_padding`: behind the end mark stands token 0 without a mask, as the published code has it."""
    text = [name for name in base.parts.target_layers if base.parts.tower(name) == "text"]
    layers = {name: base.model.get_submodule(name) for name in text}
    hidden, masks = {name: [] for name in text}, []
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, name=name: hidden[name].append(args[0][0].double().numpy())
        )
        for name, layer in layers.items()
    ]
    for own in records["Alpha"][0].classes.texts:
        tokens = tokens_of(base, own[0])
        masks.append(tokens.get("attention_mask", torch.ones(1, PLACES_TEXT))[0].tolist())
        if padding:
            tokens = {"input_ids": tokens["input_ids"] * (torch.tensor(masks[-1]).long())}
        with torch.no_grad():
            base.model.text_model(**tokens)
    for hook in hooks:
        hook.remove()
    batch = base.family.training_batch(records["Alpha"][:4])
    found = collect_moments(base.family, base.model, layers, [batch], FeaturePlan(padding=padding))
    for name in text:
        rows = oracle.text_rows(hidden[name], masks, padding)
        expected = oracle.second_moment(rows)
        assert found[name].count == len(rows)
        np.testing.assert_allclose(found[name].moments.numpy(), expected, rtol=1e-4, atol=1e-5 * expected.max())


@pytest.mark.parametrize("towers", [None, ("vision",), ("text",)])
@pytest.mark.parametrize("gamma", [0.2, 0.7])
def test_layer_scales_rise_in_each_tower_by_itself(base, towers, gamma):
    options = KeepLoRAOptions(layer_scale="linear", layer_scale_gamma=gamma, layer_scale_towers=towers)
    depths = {layer: base.parts.depth(layer) for layer in base.parts.target_layers}
    found = options.layer_scales(depths, {layer: base.parts.tower(layer) for layer in depths})
    for tower, blocks in {"vision": range(3), "text": range(2)}.items():
        expected = oracle.layer_scales(blocks, gamma, towers is None or tower in towers)
        own = [layer for layer in depths if base.parts.tower(layer) == tower]
        assert {depths[layer] for layer in own} == set(blocks)
        assert all(found[layer] == pytest.approx(expected[depths[layer]]) for layer in own)
