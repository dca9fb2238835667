"""The invariants of KeepLoRA in each tower of a CLIP and of a SigLIP, over two domains; against the float64 oracle.

Numbers in brackets are those of the invariants. Thresholds and scales differ by tower, and features are of one batch.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters, Branch, Factors
from mllm_keeplora.adapters.stored import kept_of, save_growth
from mllm_keeplora.config import BaseConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.linalg import Basis
from mllm_keeplora.models import load_base
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.runs import RunDir, Unit
from mllm_keeplora.strategies.subspace.keeplora import KeepLoRA, KeepLoRAOptions
from mllm_keeplora.system import distributed
from mllm_keeplora.system.files import write_tensors
from tests.oracles import dual as oracle
from tests.oracles import subspace, training
from tests.support.keeplora import columns_of, context_of, fit, modules_of, weights_of
from tests.support.strategies import open_branch
from tests.unit.conftest import snapshot

TOWERS = {"vision": 3, "text": 2}  # blocks
TOLERANCE = 1e-5
RANK, ALPHA, GAMMA, ENERGY_FEATURES = 3, 6.0, 0.2, 0.9
ENERGY_WEIGHTS = {"vision": 0.6, "text": 0.3}
OPTIONS = KeepLoRAOptions(
    rank=RANK,
    alpha=ALPHA,
    thresholds={f"^{tower}_model": {"energy_weights": energy} for tower, energy in ENERGY_WEIGHTS.items()},
    energy_features=ENERGY_FEATURES,
    grad_samples=1.0,
    feature_samples=1.0,
    layer_scale="linear",
    layer_scale_gamma=GAMMA,
    layer_scale_towers=("vision",),
)


@pytest.fixture(params=TOWERS)
def tower(request) -> str:
    return request.param


@dataclass
class Taught:
    """All about one domain; arrays are float64 numpy, by layer."""

    gradient: dict  # plain autograd's, of the mean loss before the domain
    features: dict  # rows that plain hooks see after the training
    kept_before: dict
    kept_after: dict
    opened: dict  # state of the model as the branch was opened, and as training left it
    trained: dict
    branch: Branch
    factors: Factors
    logits: dict  # before, opened, adapted, restored
    added_again: dict  # the same features once more


@dataclass
class Sequence:
    new: Any  # function -> the base as it was
    records: dict
    pristine: dict
    domains: list[Taught]

    def each(self, tower):
        """(domain, layer) of a tower; asserts that none is missing."""
        pairs = [(d, name) for d in self.domains for name in d.branch.A if name.startswith(f"{tower}_model")]
        assert len(pairs) == 2 * 4 * TOWERS[tower]
        return pairs


@torch.no_grad()
def logits_of(model, batch):
    return model.eval()(**inputs_of(batch)).logits_per_image


def loss_of(base, model, batch):
    """Loss (12) from the model's own logits; of the tiny lists, all classes compete."""
    return torch.nn.functional.cross_entropy(model(**inputs_of(batch)).logits_per_image, batch["labels"])


def autograd(base, adapters, records):
    weights, batch = weights_of(adapters), base.family.training_batch(records)
    needed = {name: each.requires_grad for name, each in adapters.model.named_parameters()}
    for weight in weights.values():
        weight.requires_grad_(True)
    adapters.model.eval()
    found = torch.autograd.grad(loss_of(base, adapters.model, batch), list(weights.values()))
    for name, each in adapters.model.named_parameters():
        each.requires_grad_(needed[name])
    return {name: gradient.double().numpy() for name, gradient in zip(weights, found, strict=True)}


def rows_of(base, model, records):
    """Rows of each target layer: of every picture, and of texts what is no padding, where padding is masked."""
    seen, hooks = {}, []
    for name, module in modules_of(base).items():
        keep = lambda module, args, name=name: seen.update({name: args[0].double().numpy().copy()})  # noqa: E731
        hooks.append(module.register_forward_pre_hook(keep))
    batch = base.family.training_batch(records)
    logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).tolist()
    whole = {name: [[1] * x.shape[1]] * len(x) if name.startswith("vision") else mask for name, x in seen.items()}
    return {name: oracle.text_rows(x, whole[name], padding=False) for name, x in seen.items()}


def begin(base, records, options=OPTIONS, history="merged", kept=None):
    """What precedes a first domain's training: adapters, strategy, bases, context; the branch is open."""
    adapters, strategy = Adapters(base, history, 0.0), KeepLoRA(options)
    if kept is None:
        strategy.prepare(context_of(base, adapters, kept := {}, [], -1))
    context = context_of(base, adapters, kept, records, probe_batch=5)
    open_branch(strategy, context)
    return adapters, strategy, kept, context


@pytest.fixture(scope="module")
def new(dual_folder):
    """Function -> the same base each time, with weights of its own."""
    loaded = load_base(BaseConfig(model=str(dual_folder)), "frozen")
    return lambda: replace(loaded, model=copy.deepcopy(loaded.model))


@pytest.fixture(scope="module", params=["merged", "factors"])
def taught(request, new, records, tmp_path_factory):
    """Two domains of different class lists, taught by the strategy, the adapters and the real trainer."""
    base, folder = new(), tmp_path_factory.mktemp("taught")
    adapters, strategy, kept = Adapters(base, request.param, 0.0), KeepLoRA(OPTIONS), {}
    pristine, domains, past = snapshot(base.model), [], []
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    for index, (name, own) in enumerate(records.items()):
        batch, before = base.family.training_batch(own[:4]), columns_of(kept)
        logits, gradient = {"before": logits_of(adapters.model, batch)}, autograd(base, adapters, own)
        # batches divide the records: texts, which each batch reads, weigh as in one batch of all
        context = context_of(base, adapters, kept, own, index, probe_batch=len(own))
        open_branch(strategy, context)
        branch, opened, logits["opened"] = adapters.branch, snapshot(adapters.model), logits_of(adapters.model, batch)
        fit(strategy, context, folder / name, epochs=2.0, lr=3e-2)
        trained, logits["adapted"] = snapshot(adapters.model), logits_of(adapters.model, batch)
        features = rows_of(base, adapters.model, own)
        strategy.after_domain(context)
        after = columns_of(kept)
        strategy.after_domain(context)
        factors = adapters.read()
        past.append(factors)
        adapters.restore(past, [])
        logits["restored"] = logits_of(adapters.model, batch)
        again = dict(context.facts["added"])
        domains.append(Taught(gradient, features, before, after, opened, trained, branch, factors, logits, again))
    return Sequence(new, records, pristine, domains)


def test_a_is_orthonormal_and_outside_of_what_is_kept(taught, tower):
    """[1, 2]: the last block of texts has a gradient of at most as many directions as there are classes."""
    for domain, layer in taught.each(tower):
        A = domain.branch.A[layer].double().numpy()
        assert len(A) == len(subspace.initial_a(domain.gradient[layer], domain.kept_before[layer], RANK)) > 1
        assert np.linalg.norm(A @ A.T - np.eye(len(A)), 2) < TOLERANCE
        assert np.linalg.norm(A @ domain.kept_before[layer], 2) < TOLERANCE


def test_a_is_the_top_of_the_residual_gradient(taught, tower):
    """[14], equations (2) to (4)"""
    rng = np.random.default_rng(0)
    for domain, layer in taught.each(tower):
        gradient, kept, A = domain.gradient[layer], domain.kept_before[layer], domain.branch.A[layer].double().numpy()
        sigma = np.linalg.svd(subspace.residual_gradient(gradient, kept), compute_uv=False)
        captured = subspace.energy(gradient @ A.T)
        assert captured == pytest.approx((sigma[:RANK] ** 2).sum(), rel=1e-4)
        if sigma[RANK - 1] > 1.01 * sigma[RANK]:  # else which directions are the top is a matter of rounding
            expected = subspace.initial_a(gradient, kept, RANK)
            assert subspace.projector_difference(A.T, expected.T) < 1e-2
        other = subspace.gram_schmidt(rng.standard_normal((A.shape[1], len(A))), kept)
        assert subspace.energy(gradient @ other) <= captured * (1 + 1e-5)


def test_bases_are_orthonormal_grow_and_are_no_wider_than_needed(taught, tower):
    """[3, 4, 5, 7], equations (8) to (10)"""
    grew = 0
    for domain, layer in taught.each(tower):
        before, after, rows = domain.kept_before[layer], domain.kept_after[layer], domain.features[layer]
        assert np.linalg.norm(after.T @ after - np.eye(after.shape[1]), 2) < TOLERANCE
        assert np.array_equal(after[:, : before.shape[1]], before) and after.shape[1] <= after.shape[0]
        expected = subspace.grow(before, rows, ENERGY_FEATURES)
        assert after.shape == expected.shape and subspace.projector_difference(after, expected) < 1e-3
        assert subspace.coverage(after, rows) >= ENERGY_FEATURES - 1e-6
        if after.shape[1] > before.shape[1]:
            assert subspace.coverage(after[:, :-1], rows) < ENERGY_FEATURES
            grew += 1
        assert domain.added_again[layer] == 0
    assert grew
    for earlier, later in pairwise(taught.domains):
        assert all(np.array_equal(earlier.kept_after[layer], kept) for layer, kept in later.kept_before.items())


def test_bases_come_back_from_disk_bit_for_bit(taught, tmp_path):
    """[3]"""
    first = taught.domains[0]
    run, unit = RunDir(tmp_path), Unit(1, "Alpha", ("Alpha",))
    write_tensors(run.kept_by_prepare, {name: torch.tensor(kept).float() for name, kept in first.kept_before.items()})
    kept = {name: Basis.from_columns(torch.tensor(after).float()) for name, after in first.kept_after.items()}
    save_growth(run.folder(unit), kept, {name: q.shape[1] for name, q in first.kept_before.items()}, {})
    stored = columns_of(kept_of(run, [unit]))
    assert all(np.array_equal(stored[name], first.kept_after[name]) for name in first.kept_after)


def test_first_bases_reach_the_threshold_of_their_tower(taught, tower):
    """[4, 6]"""
    first = taught.domains[0].kept_before
    for layer in {layer for _, layer in taught.each(tower)}:
        weight, energy = taught.pristine[f"{layer}.weight"].numpy(), ENERGY_WEIGHTS[tower]
        expected = subspace.principal_subspace(weight, energy)
        assert 1 <= first[layer].shape[1] == expected.shape[1] <= min(weight.shape)
        assert subspace.projector_difference(first[layer], expected) < TOLERANCE
        assert subspace.coverage(first[layer], weight) >= energy > subspace.coverage(first[layer][:, :-1], weight)


def test_no_update_moves_a_protected_input_and_all_lie_in_the_span_of_a(taught, tower):
    """[8, 9]"""
    rng = np.random.default_rng(1)
    for domain, layer in taught.each(tower):
        A, kept = domain.factors.A[layer].double().numpy(), domain.kept_before[layer]
        delta = domain.factors.delta(layer).double().numpy()
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert sigma[0] > 0 and (sigma[RANK:] < 1e-6 * sigma[0]).all()
        assert np.linalg.norm(delta @ A.T @ A - delta) < TOLERANCE * np.linalg.norm(delta)
        x = kept @ rng.standard_normal(kept.shape[1])
        for B in (domain.factors.B[layer], 1e3 * torch.randn(domain.factors.B[layer].shape)):
            moved = replace(domain.factors, B={**domain.factors.B, layer: B}).delta(layer).double().numpy()
            assert np.linalg.norm(moved @ x) <= TOLERANCE * np.linalg.norm(x) * np.linalg.norm(moved)


@pytest.mark.parametrize("history", ["merged", "factors"])
@pytest.mark.parametrize("b_init", ["zero", "gradient"])
def test_the_function_is_the_same_when_a_domain_begins(new, records, b_init, history):
    """[10], for (5a) and (5b); B of (5a) is the residual gradient seen through A."""
    base, own = new(), records["Alpha"]
    batch = base.family.training_batch(own[:4])
    before = logits_of(base.model, batch)
    adapters, _, kept, _ = begin(base, own, OPTIONS.model_copy(update={"b_init": b_init}), history)
    assert (logits_of(adapters.model, batch) - before).abs().max() < TOLERANCE * before.abs().max()
    gradient = autograd(fresh := new(), Adapters(fresh, "merged", 0.0), own)
    for layer, A in adapters.branch.A.items():
        B = base.model.get_submodule(layer).lora_B["domain"].weight
        if b_init == "zero":
            assert not B.any()
            continue
        expected = subspace.initial_b_gradient(gradient[layer], kept[layer].columns.numpy(), A.numpy())
        assert np.linalg.norm(B.detach().numpy() - expected) < 1e-3 * np.linalg.norm(expected)


def test_what_is_merged_answers_as_the_branch_did(taught, tower):
    """[11], equation (7)"""
    for domain in taught.domains:
        size = domain.logits["before"].abs().max()
        assert (domain.logits["opened"] - domain.logits["before"]).abs().max() < TOLERANCE * size
        assert (domain.logits["adapted"] - domain.logits["before"]).abs().max() > 1e-3 * size
        assert (domain.logits["restored"] - domain.logits["adapted"]).abs().max() < TOLERANCE * size
    base = taught.new()
    merged = Adapters(base, "merged", 0.0)
    past = [domain.factors for domain in taught.domains]
    merged.restore(past, [])
    for layer in {layer for _, layer in taught.each(tower)}:
        g = oracle.layer_scales(range(TOWERS[tower]), GAMMA, tower == "vision")[base.parts.depth(layer)]
        stack = [(each.A[layer].numpy(), each.B[layer].numpy(), ALPHA / RANK * g) for each in past]
        expected = subspace.merge(taught.pristine[f"{layer}.weight"].numpy(), stack)
        assert np.abs(merged.weight(layer).double().numpy() - expected).max() < 1e-6


def test_training_changes_b_alone(taught, tower):
    """[12]: A, the base, embeddings, temperature and bias stay bit for bit."""
    for domain in taught.domains:
        changed = {name for name, value in domain.trained.items() if not torch.equal(value, domain.opened[name])}
        assert changed == {f"base_model.model.{layer}.lora_B.domain.weight" for layer in domain.branch.A}
    for domain, layer in taught.each(tower):
        assert torch.equal(domain.factors.A[layer], domain.branch.A[layer])


@pytest.mark.parametrize("micro", [8, 3])
def test_one_step_of_gradient_descent_is_the_projected_gradient(new, records, tmp_path, micro):
    """[13], equation (6), also where a batch comes in several parts of unequal length."""
    base, own, lr = new(), records["Alpha"][:8], 0.05
    gradient = autograd(fresh := new(), Adapters(fresh, "merged", 0.0), own)
    adapters, strategy, _, context = begin(base, own)
    settings = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0}
    settings["batch_size"] = 8 if micro == 8 else 9  # one step, of one part or of 3, 3 and 2 records
    facts = fit(strategy, context, tmp_path, lr=lr, micro_batch_size=micro, optimizer="sgd", **settings)
    assert facts["steps"] == 1
    factors = adapters.read()
    for layer in factors.B:
        tower = base.parts.tower(layer)
        g = oracle.layer_scales(range(TOWERS[tower]), GAMMA, tower == "vision")[base.parts.depth(layer)]
        expected = training.sgd_delta_weight(gradient[layer], factors.A[layer].numpy(), ALPHA / RANK, g, lr)
        assert np.linalg.norm(expected) > 0
        assert np.linalg.norm(factors.delta(layer).numpy() - expected) < 1e-3 * np.linalg.norm(expected), layer


def test_layer_scales_rise_in_the_tower_that_is_scaled(taught, tower):
    """[15]"""
    base = taught.new()
    for domain, layer in taught.each(tower):
        g = domain.branch.alpha[layer] / len(domain.branch.A[layer]) / (ALPHA / RANK)
        expected = oracle.layer_scales(range(TOWERS[tower]), GAMMA, tower == "vision")
        assert g == pytest.approx(expected[base.parts.depth(layer)])
    ramp = list(oracle.layer_scales(range(TOWERS[tower]), GAMMA).values())
    assert ramp[0] == GAMMA and ramp[-1] == 1.0 and all(a < b for a, b in pairwise(ramp))
    assert oracle.layer_scales([1], GAMMA) == {1: 1.0}


def test_a_scale_of_one_is_keeplora_bit_for_bit(new, records):
    """[15]"""
    starts = []
    for changes in ({"layer_scale": "none"}, {"layer_scale": "linear", "layer_scale_gamma": 1.0}):
        adapters, *_ = begin(new(), records["Alpha"], OPTIONS.model_copy(update=changes))
        starts.append(adapters.branch)
    assert starts[0].alpha == starts[1].alpha
    assert all(torch.equal(A, starts[1].A[layer]) for layer, A in starts[0].A.items())


def test_moments_and_stacked_rows_give_the_same_growth(taught, tower):
    """[16]"""
    for domain, layer in taught.each(tower):
        before, rows = domain.kept_before[layer], domain.features[layer]
        values, vectors = np.linalg.eigh(oracle.second_moment(subspace.residual_features(rows, before)))
        total, covered = subspace.energy(rows), subspace.covered_share(rows, before)
        m = subspace.select(np.sqrt(np.clip(values[::-1], 0, None)), total, covered, ENERGY_FEATURES)
        by_moments = np.concatenate([before, vectors[:, ::-1][:, :m]], axis=1)
        assert domain.kept_after[layer].shape == by_moments.shape
        assert subspace.projector_difference(domain.kept_after[layer], by_moments) < 1e-3


def test_sums_over_processes_are_those_of_one(new, records, tower, monkeypatch):
    """[17]: gradients and features of pictures add up; texts are read in every batch, so their features as often."""
    base, own = new(), records["Alpha"][:8]
    context = context_of(base, Adapters(base, "merged", 0.0), {}, own, probe_batch=2)
    whole = context.passes.features(8), context.passes.gradients(8)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensors: None)
    monkeypatch.setattr(distributed, "from_main", lambda value: value)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])
    monkeypatch.setenv("WORLD_SIZE", "2")
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        shares.append((context.passes.features(8), context.passes.gradients(8)))
    for kind in (0, 1):
        for layer in (name for name in whole[kind] if name.startswith(tower)):
            parts = zip(*(share[kind][layer].tensors() for share in shares), strict=True)
            for (first, second), expected in zip(parts, whole[kind][layer].tensors(), strict=True):
                torch.testing.assert_close(first + second, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_legacy_rule_and_side(new, records, tower):
    """[18]: one direction fewer, but one at least; output directions of square weights; others are refused."""
    legacy = {"rank_rule": "below_legacy", "weight_side": "output_legacy"}
    base = new()
    weights = {layer: module.weight.double().numpy().copy() for layer, module in modules_of(base).items()}
    adapters, _, kept, _ = begin(base, records["Alpha"], OPTIONS.model_copy(update=legacy))
    for layer in (name for name in weights if base.parts.tower(name) == tower):
        expected, found = (
            subspace.output_subspace_legacy(weights[layer], ENERGY_WEIGHTS[tower]),
            columns_of(kept)[layer],
        )
        reach = subspace.principal_subspace(weights[layer], ENERGY_WEIGHTS[tower])
        assert found.shape[1] == max(reach.shape[1] - 1, 1)
        assert subspace.projector_difference(found, expected) < TOLERANCE
        assert np.abs(adapters.branch.A[layer].double().numpy() @ found).max() < TOLERANCE
    oblong = replace(base, parts=type(base.family).name_parts(base.model, "frozen", [f"{tower}_model.*mlp.fc1"]))
    with pytest.raises(UserError, match=r"output_legacy, but \d of \d layers are not square, first \w+_model"):
        own = OPTIONS.model_copy(update={**legacy, "thresholds": {}, "layer_scale_towers": None})
        KeepLoRA(own).prepare(context_of(oblong, Adapters(oblong, "merged", 0.0), {}, [], -1))


def test_the_same_records_give_the_same_a(new, records):
    """[19]"""
    first, second = (begin(new(), records["Alpha"])[0].branch.A for _ in range(2))
    assert all(torch.equal(A, second[layer]) for layer, A in first.items())


def test_a_full_space_gives_fewer_directions_and_never_one_inside(new, records, tower):
    """[20]"""
    base, generator = new(), torch.Generator().manual_seed(0)
    room = dict(zip((name for name in base.parts.target_layers if name.startswith(tower)), range(8), strict=False))
    kept = {}
    for layer, module in modules_of(base).items():
        columns = torch.linalg.qr(torch.randn(module.in_features, module.in_features, generator=generator))[0]
        kept[layer] = Basis.from_columns(columns[:, : module.in_features - room.get(layer, 2)])
    adapters, *_ = begin(base, records["Alpha"], kept=kept)
    for layer, free in room.items():
        assert (layer in adapters.branch.A) == (free > 0)
        if free:
            A = adapters.branch.A[layer].double().numpy()
            assert len(A) == min(free, RANK)
            assert np.linalg.norm(A @ columns_of(kept)[layer], axis=1).max() < TOLERANCE
            assert adapters.branch.alpha[layer] / len(A) == pytest.approx(
                ALPHA
                / RANK
                * oracle.layer_scales(range(TOWERS[tower]), GAMMA, tower == "vision")[base.parts.depth(layer)]
            )


# -- KeepLoRA+ beside KeepLoRA -------------------------------------------------------------------------------------


def test_prototypes_leave_where_a_domain_starts_alone(new, records):
    """Their gradient is no part of the pass of their own domain."""
    plain, plus = (
        begin(new(), records["Alpha"], OPTIONS.model_copy(update={"prototypes": each}))[0].branch
        for each in (None, "cosine")
    )
    assert plain.alpha == plus.alpha and plain.prototypes is None
    assert all(torch.equal(A, plus.A[layer]) for layer, A in plain.A.items())
    assert np.linalg.norm(plus.prototypes.P.detach().numpy(), axis=1) == pytest.approx(1.0)


def test_prototypes_too_faint_to_tell_leave_a_training_bit_equal(new, records, tmp_path):
    """Hence they change neither the order of batches nor any random number; seen, they change what is learnt."""
    learnt = {}
    for name, options in {
        "without": {},
        "faint": {"prototypes": "cosine", "prototype_scale": 1e-30},
        "seen": {"prototypes": "cosine"},
    }.items():
        adapters, strategy, _, context = begin(new(), records["Alpha"], OPTIONS.model_copy(update=options))
        torch.manual_seed(0)
        fit(strategy, context, tmp_path / name, epochs=2.0, batch_size=5)
        learnt[name] = adapters.read().B
    for layer, B in learnt["without"].items():
        assert torch.equal(learnt["faint"][layer], B), layer
    assert not all(torch.equal(learnt["seen"][layer], B) for layer, B in learnt["without"].items())


def test_answers_without_prototypes_are_those_of_keeplora_bit_for_bit(new, records, tmp_path):
    """Left out of a trained model, or asked of another list of classes, they answer nothing."""
    base = new()
    own = OPTIONS.model_copy(update={"prototypes": "cosine"})
    adapters, strategy, _, context = begin(base, records["Alpha"], own)
    fit(strategy, context, tmp_path, epochs=2.0)
    factors, prototypes = adapters.read(), adapters.prototypes()
    assert prototypes.classes == records["Alpha"][0].classes.digest

    def asked(model, name):
        with torch.inference_mode(), base.family.asking(False):
            return base.family.answers(model, base.family.question_batch(records[name][:6]), 1, lambda rows: None)

    adapters.restore([factors], [], prototypes={prototypes.classes: prototypes})
    held = {name: asked(adapters.model, name) for name in records}
    adapters.restore([factors], [])
    plain = {name: asked(adapters.model, name) for name in records}
    other = new()
    never = Adapters(other, "merged", 0.0)
    never.restore([factors], [])
    assert plain == {name: asked(never.model, name) for name in records}
    assert held["Beta"] == plain["Beta"] and held["Alpha"] != plain["Alpha"]
