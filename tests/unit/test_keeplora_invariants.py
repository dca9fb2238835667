"""KeepLoRA on a tiny model: the method's invariants, against the float64 oracle.

Two domains are taught once per history by the strategy, the adapters and the real trainer; the tests look at what was
recorded. Scales differ from layer to layer (layer scale g_l != 1). Numbers in brackets are those of the invariants.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_keeplora import distributed
from mllm_keeplora.adapters import Adapters, Branch, Factors
from mllm_keeplora.adapters.stored import kept_of, save_new_columns
from mllm_keeplora.config import TrainConfig
from mllm_keeplora.data.collate import TrainCollator
from mllm_keeplora.files import write_tensors
from mllm_keeplora.linalg import Basis, gradient_capture
from mllm_keeplora.runs import RunDir, Unit
from mllm_keeplora.strategies import DomainInfo
from mllm_keeplora.strategies.keeplora import KeepLoRA, KeepLoRAOptions
from mllm_keeplora.training.context import RunContext
from mllm_keeplora.training.fit import fit_domain, training_arguments
from tests.oracles import subspace, training
from tests.unit.conftest import autograd_mean_gradients, captured_tokens, encode, logits_of, snapshot

TOLERANCE = 1e-5
RANK, ALPHA, ENERGY_WEIGHTS, ENERGY_FEATURES, SAMPLES = 4, 8.0, 0.4, 0.9, 8
CHOSEN = (0, 1, 3, 4, 6, 7, 9, 10)  # eight of twelve records, evenly spaced
OPTIONS = KeepLoRAOptions(
    rank=RANK,
    alpha=ALPHA,
    energy_weights=ENERGY_WEIGHTS,
    energy_features=ENERGY_FEATURES,
    grad_samples=SAMPLES,
    feature_samples=SAMPLES,
)
QUICK = settings(max_examples=15, deadline=None)


def layer_scale(depth):
    return 0.6 if depth is None else subspace.layer_scale(depth, 0, 2, gamma=0.2)


class Scaled(KeepLoRA):
    """KeepLoRA whose every layer has a scale g_l of its own."""

    def before_domain(self, context):
        super().before_domain(context)
        adapters = context.branches
        branch = adapters.branch
        adapters.restore(adapters.past, adapters.past_full)
        alpha = {layer: layer_scale(context.depth(layer)) * value for layer, value in branch.alpha.items()}
        adapters.open(replace(branch, alpha=alpha))


@dataclass
class Taught:
    """All about one domain; arrays are float64 numpy, by layer."""

    gradient: dict  # mean of single-sample autograd gradients before the domain
    kept_before: dict
    kept_after: dict
    added: dict
    tokens: dict  # all features of the probed records, branch active
    opened: dict  # state of the model as the branch was opened, and as training left it
    trained: dict
    listed: set  # names of the parameters that were to train
    branch: Branch
    factors: Factors
    logits: dict  # before, opened, adapted, restored
    facts: dict


@dataclass
class Sequence:
    base: Any
    adapters: Adapters
    pristine: dict
    records: dict
    domains: list[Taught]
    added_again: dict  # the last domain's features once more


def columns_of(kept):
    return {layer: basis.columns.double().numpy().copy() for layer, basis in kept.items()}


def context_of(base, adapters, kept, records, index=0, probe_batch=3):
    collator = TrainCollator(base.prompt)
    rng = torch.Generator().manual_seed(index)
    return RunContext(base, adapters, kept, DomainInfo(index, f"domain {index}"), records, collator, rng, probe_batch)


def fit(strategy, context, folder, optimizer="adamw_torch", **settings):
    values = {"lr": 1e-2, "batch_size": 4, "log_steps": 1, **settings}
    values["args"] = {"save_strategy": "no", "optim": optimizer}
    config = TrainConfig(**values)
    arguments = training_arguments(config, config.epochs, folder / "checkpoints", 0, None, False)
    folder.mkdir(parents=True, exist_ok=True)
    return fit_domain(strategy, context, config, config.epochs, arguments, folder / "metrics.jsonl", {})


def weights_of(adapters):
    modules = {layer: adapters.base.get_submodule(layer) for layer in adapters.layers}
    return {layer: getattr(module, "base_layer", module).weight for layer, module in modules.items()}


def modules_of(base):
    return {layer: base.model.get_submodule(layer) for layer in base.parts.target_layers}


def teach(base, history, records, folder):
    adapters = Adapters(base.model, base.parts.target_layers, history, 0.0)
    pristine = snapshot(base.model)
    batch = encode(base, records["Alpha"][:3])
    strategy, kept, domains, past = Scaled(OPTIONS), {}, [], []
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    for index, name in enumerate(records):
        samples = [encode(base, [records[name][position]]) for position in CHOSEN]
        gradient = autograd_mean_gradients(adapters.model, weights_of(adapters), samples)
        kept_before, logits = columns_of(kept), {"before": logits_of(adapters.model, batch)}
        context = context_of(base, adapters, kept, records[name], index)
        strategy.before_domain(context)
        branch, listed = adapters.branch, set(adapters.trainable())
        opened, logits["opened"] = snapshot(adapters.model), logits_of(adapters.model, batch)
        fit(strategy, context, folder / name)
        trained, logits["adapted"] = snapshot(adapters.model), logits_of(adapters.model, batch)
        tokens = captured_tokens(adapters.model, modules_of(base), samples)
        strategy.after_domain(context)
        facts, kept_after = dict(context.facts), columns_of(kept)
        strategy.after_domain(context)
        added_again = dict(context.facts["added"])
        factors = adapters.read()
        past.append(factors)
        adapters.restore(past, [])
        logits["restored"] = logits_of(adapters.model, batch)
        domains.append(
            Taught(
                gradient, kept_before, kept_after, facts["added"], tokens, opened, trained, listed,
                branch, factors, logits, facts,
            )
        )  # fmt: skip
    return Sequence(base, adapters, pristine, records, domains, added_again)


@pytest.fixture(scope="module", params=["merged", "factors"])
def taught(request, new_base, tiny_records, tmp_path_factory):
    return teach(new_base(), request.param, tiny_records, tmp_path_factory.mktemp(request.param))


def each_layer(taught):
    """(domain, layer) of everything that has a branch; asserts that nothing is missing."""
    pairs = [(domain, layer) for domain in taught.domains for layer in domain.branch.A]
    assert len(pairs) == 2 * 16
    return pairs


def delta_of(domain, layer):
    A, B = domain.factors.A[layer].numpy(), domain.factors.B[layer].numpy()
    return subspace.delta_weight(A, B, domain.factors.alpha[layer] / A.shape[0])


# -- the kept basis --------------------------------------------------------------------------------------------------


def test_first_kept_basis_is_the_principal_input_subspace_of_each_weight(taught):
    """[4, 6]"""
    for layer, kept in taught.domains[0].kept_before.items():
        weight = taught.pristine[f"{layer}.weight"].numpy()
        expected = subspace.principal_subspace(weight, ENERGY_WEIGHTS)
        assert 1 <= kept.shape[1] == expected.shape[1] <= min(weight.shape)
        assert subspace.projector_difference(kept, expected) < TOLERANCE
        assert subspace.coverage(kept, weight) >= ENERGY_WEIGHTS
        assert subspace.coverage(kept[:, :-1], weight) < ENERGY_WEIGHTS


def test_kept_bases_are_orthonormal_after_every_growth(taught):
    """[3]"""
    for domain in taught.domains:
        for kept in (*domain.kept_before.values(), *domain.kept_after.values()):
            assert np.linalg.norm(kept.T @ kept - np.eye(kept.shape[1]), 2) < TOLERANCE


def test_kept_bases_come_back_from_disk_bit_for_bit(taught, tmp_path):
    """[3]"""
    units = [Unit(1, "Alpha", ("Alpha",)), Unit(2, "Beta", ("Beta",))]
    run = RunDir(tmp_path)
    first = taught.domains[0].kept_before
    write_tensors(run.kept_by_prepare, {layer: torch.tensor(kept).float() for layer, kept in first.items()})
    for unit, domain in zip(units, taught.domains, strict=True):
        kept = {layer: Basis.from_columns(torch.tensor(after).float()) for layer, after in domain.kept_after.items()}
        save_new_columns(run.folder(unit), kept, {layer: q.shape[1] for layer, q in domain.kept_before.items()})
    for count, expected in enumerate([first, *(domain.kept_after for domain in taught.domains)]):
        stored = columns_of(kept_of(run, units[:count]))
        assert stored.keys() == expected.keys()
        assert all(np.array_equal(stored[layer], expected[layer]) for layer in expected)


def test_kept_subspaces_only_ever_grow(taught):
    """[4]"""
    first, second = taught.domains
    for layer in taught.adapters.layers:
        bases = [first.kept_before[layer], first.kept_after[layer], second.kept_before[layer], second.kept_after[layer]]
        ranks = [basis.shape[1] for basis in bases]
        assert ranks == sorted(ranks) and ranks[-1] <= bases[0].shape[0]
        assert np.array_equal(bases[1], bases[2])
        for earlier, later in pairwise(bases):
            assert np.array_equal(later[:, : earlier.shape[1]], earlier), "earlier columns stay bit for bit"
    assert sum(first.added.values()) > 0 and sum(second.added.values()) > 0


def test_growth_is_that_of_the_reference_from_all_stacked_tokens(taught):
    """[5], equations (8)-(10)"""
    for domain in taught.domains:
        for layer, kept in domain.kept_after.items():
            before, tokens = domain.kept_before[layer], domain.tokens[layer]
            expected = subspace.grow(before, tokens, ENERGY_FEATURES)
            assert domain.added[layer] == expected.shape[1] - before.shape[1] == kept.shape[1] - before.shape[1]
            assert subspace.projector_difference(kept, expected) < 1e-3


def test_kept_basis_covers_enough_of_the_features_and_no_more_than_needed(taught):
    """[5]"""
    minimal = 0
    for domain in taught.domains:
        for layer, kept in domain.kept_after.items():
            assert subspace.coverage(kept, domain.tokens[layer]) >= ENERGY_FEATURES - 1e-6
            if domain.added[layer]:
                assert subspace.coverage(kept[:, :-1], domain.tokens[layer]) < ENERGY_FEATURES
                minimal += 1
    assert minimal > 16


def test_the_same_features_once_more_add_nothing(taught):
    """[7]"""
    assert taught.added_again == dict.fromkeys(taught.adapters.layers, 0)


# -- A ---------------------------------------------------------------------------------------------------------------


def test_rows_of_a_are_orthonormal_and_outside_the_kept_basis(taught):
    """[1, 2]"""
    for domain, layer in each_layer(taught):
        A = domain.branch.A[layer].double().numpy()
        assert A.shape[0] == RANK
        assert np.linalg.norm(A @ A.T - np.eye(RANK), 2) < TOLERANCE
        assert np.linalg.norm(A @ domain.kept_before[layer], 2) < TOLERANCE


def test_a_spans_the_top_of_the_residual_of_the_autograd_gradient(taught):
    """Equations (2)-(4)"""
    for domain, layer in each_layer(taught):
        expected = subspace.initial_a(domain.gradient[layer], domain.kept_before[layer], RANK)
        found = domain.branch.A[layer].numpy()
        assert found.shape == expected.shape
        assert subspace.projector_difference(found.T, expected.T) < 1e-3


def test_a_captures_the_top_singular_mass_of_the_residual_gradient(taught):
    """[14]"""
    for domain, layer in each_layer(taught):
        residual = subspace.residual_gradient(domain.gradient[layer], domain.kept_before[layer])
        mass = (np.linalg.svd(residual, compute_uv=False)[:RANK] ** 2).sum()
        captured = subspace.energy(domain.gradient[layer] @ domain.branch.A[layer].double().numpy().T)
        assert captured == pytest.approx(mass, rel=1e-4)


@QUICK
@given(st.integers(0, 31), st.integers(0, 10**6))
def test_no_other_directions_outside_the_basis_capture_more(taught, which, seed):
    """[14]"""
    domain, layer = each_layer(taught)[which]
    kept, gradient = domain.kept_before[layer], domain.gradient[layer]
    vectors = np.random.default_rng(seed).standard_normal((kept.shape[0], RANK))
    other = subspace.gram_schmidt(vectors, kept)
    assert np.abs(kept.T @ other).max() < 1e-8
    captured = np.linalg.norm(gradient @ domain.branch.A[layer].double().numpy().T)
    assert np.linalg.norm(gradient @ other) <= captured * (1 + 1e-5)


def test_logged_shares_of_the_gradient_are_those_of_the_reference(taught):
    for domain, layer in each_layer(taught):
        facts = domain.facts["gradient"][layer]
        A = domain.branch.A[layer].numpy()
        shares = subspace.capture_split(domain.gradient[layer], domain.kept_before[layer], A)
        assert (facts["protected"], facts["captured"], facts["discarded"]) == pytest.approx(shares, abs=1e-4)
        assert facts["rank"] == RANK and facts["kept"] == domain.kept_before[layer].shape[1]


# -- training --------------------------------------------------------------------------------------------------------


def test_the_function_is_unchanged_when_the_branch_is_opened(taught):
    """[10]"""
    for domain in taught.domains:
        assert (domain.logits["opened"] - domain.logits["before"]).abs().max() < TOLERANCE
        assert (domain.logits["adapted"] - domain.logits["before"]).abs().max() > 1e-2, "training must do something"


def test_only_the_listed_parameters_change_in_training_and_all_of_them_do(taught):
    """[12]"""
    for domain in taught.domains:
        assert domain.opened.keys() == domain.trained.keys()
        changed = {name for name, value in domain.trained.items() if not torch.equal(value, domain.opened[name])}
        expected = {f"base_model.model.{layer}.lora_B.domain.weight" for layer in taught.adapters.layers}
        assert changed == domain.listed == expected


def test_a_is_bit_identical_after_training(taught):
    """[12]"""
    for domain, layer in each_layer(taught):
        trained = domain.trained[f"base_model.model.{layer}.lora_A.domain.weight"]
        assert torch.equal(trained, domain.branch.A[layer]) and torch.equal(domain.factors.A[layer], trained)


def test_a_fully_trained_projector_changes_beside_b_and_nothing_else(new_base, tiny_records, tmp_path):
    """[12]"""
    base = new_base("full")
    full = tuple(name for name, _ in base.model.named_parameters() if name.startswith("model.multi_modal_projector."))
    adapters = Adapters(base.model, base.parts.target_layers, "merged", 0.0, full)
    strategy, kept = Scaled(OPTIONS), {}
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    context = context_of(base, adapters, kept, tiny_records["Alpha"])
    strategy.before_domain(context)
    before = snapshot(adapters.model)
    fit(strategy, context, tmp_path, epochs=0.5)
    changed = {name for name, value in snapshot(adapters.model).items() if not torch.equal(value, before[name])}
    branches = {f"base_model.model.{layer}.lora_B.domain.weight" for layer in base.parts.language_layers}
    assert len(full) == 4 and len(branches) == 14
    assert changed == branches | {f"base_model.model.{name}" for name in full}


def test_the_update_has_at_most_the_rank_and_lies_in_the_span_of_a(taught):
    """[9]"""
    for domain, layer in each_layer(taught):
        delta, A = delta_of(domain, layer), domain.factors.A[layer].double().numpy()
        sigma = np.linalg.svd(delta, compute_uv=False)
        assert sigma[0] > 0 and (sigma[RANK:] < 1e-10 * sigma[0]).all()
        assert np.linalg.norm(delta @ A.T @ A - delta) < TOLERANCE * np.linalg.norm(delta)


def test_the_update_maps_kept_directions_to_zero(taught):
    """[8]"""
    for domain, layer in each_layer(taught):
        assert subspace.leak(delta_of(domain, layer), domain.kept_before[layer]) < TOLERANCE
        assert subspace.leak(domain.factors.delta(layer).numpy(), domain.kept_before[layer]) < TOLERANCE


@QUICK
@given(st.integers(0, 31), st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e3]))
def test_no_b_whatsoever_moves_a_protected_input(taught, which, seed, size):
    """[8]"""
    domain, layer = each_layer(taught)[which]
    rng = np.random.default_rng(seed)
    kept = domain.kept_before[layer]
    x = kept @ rng.standard_normal(kept.shape[1])
    B = size * rng.standard_normal(tuple(domain.factors.B[layer].shape))
    random = Factors(domain.factors.A, {**domain.factors.B, layer: torch.tensor(B).float()}, domain.factors.alpha)
    delta = random.delta(layer).double().numpy()
    assert np.linalg.norm(delta @ x) <= TOLERANCE * np.linalg.norm(x) * np.linalg.norm(delta)


@pytest.mark.parametrize("history", ["merged", "factors"])
@pytest.mark.parametrize("micro", [4, 2])
def test_one_gradient_descent_step_is_the_projected_gradient(new_base, tiny_records, tmp_path, history, micro):
    """[13], equation (6): -lr (s g_l)^2 A A^T G, with G of the very same batch."""
    base = new_base()
    records = tiny_records["Beta"][0:8:2]
    assert {len(record.turns) for record in records} == {2}, "equal numbers of answer tokens: both means are the same"
    adapters = Adapters(base.model, base.parts.target_layers, history, 0.0)
    generator = torch.Generator().manual_seed(1)
    A = {layer: torch.randn(2, w.shape[1], generator=generator) / 6 for layer, w in weights_of(adapters).items()}
    B = {layer: torch.randn(w.shape[0], 2, generator=generator) / 6 for layer, w in weights_of(adapters).items()}
    adapters.restore([Factors(A, B, dict.fromkeys(A, 1.0))], [])
    strategy, kept = Scaled(OPTIONS), {}
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    context = context_of(base, adapters, kept, records)
    gradients = context.collect_weight_gradients(len(records))
    strategy.before_domain(context)
    lr = 0.05
    facts = fit(
        strategy, context, tmp_path, lr=lr, micro_batch_size=micro, schedule="constant", warmup_ratio=0.0,
        max_grad_norm=0.0, optimizer="sgd",
    )  # fmt: skip
    assert facts["steps"] == 1
    factors, scales = adapters.read(), set()
    for layer in adapters.layers:
        scaling, g = ALPHA / RANK, layer_scale(context.depth(layer))
        scales.add(scaling * g)
        expected = training.sgd_delta_weight(gradients[layer].mean.numpy(), factors.A[layer].numpy(), scaling, g, lr)
        assert np.linalg.norm(expected) > 0
        assert np.linalg.norm(factors.delta(layer).numpy() - expected) < 1e-4 * np.linalg.norm(expected)
    assert len(scales) == 3


# -- merging ---------------------------------------------------------------------------------------------------------


def test_the_restored_model_computes_what_the_adapted_one_did(taught):
    """[11]"""
    for domain in taught.domains:
        size = domain.logits["adapted"].abs().max()
        assert (domain.logits["restored"] - domain.logits["adapted"]).abs().max() < TOLERANCE * size


def test_merged_weights_and_stacked_deltas_are_those_of_the_reference(taught, new_base):
    """[11], equation (7)"""
    base = new_base()
    merged = Adapters(base.model, base.parts.target_layers, "merged", 0.0)
    for count in (1, 2):
        merged.restore([domain.factors for domain in taught.domains[:count]], [])
        for layer in merged.layers:
            scale = ALPHA / RANK * layer_scale(base.parts.depth(layer))
            branches = [domain.factors for domain in taught.domains[:count]]
            stack = [(factors.A[layer].numpy(), factors.B[layer].numpy(), scale) for factors in branches]
            expected = subspace.merge(taught.pristine[f"{layer}.weight"].numpy(), stack)
            assert np.abs(merged.weight(layer).double().numpy() - expected).max() < 1e-6


def test_protected_inputs_pass_the_merged_layer_as_they_did_the_pristine_one(taught, new_base):
    """[8], after both merges"""
    base = new_base()
    merged = Adapters(base.model, base.parts.target_layers, "merged", 0.0)
    merged.restore([domain.factors for domain in taught.domains], [])
    for layer in merged.layers:
        kept = taught.domains[0].kept_before[layer]
        before = taught.pristine[f"{layer}.weight"].double().numpy() @ kept
        after = merged.weight(layer).double().numpy() @ kept
        assert np.linalg.norm(after - before) < TOLERANCE * np.linalg.norm(before)
        assert not torch.allclose(merged.weight(layer), taught.pristine[f"{layer}.weight"], atol=1e-4)


# -- shards, determinism, exhaustion ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "world"), [(8, 2), (7, 3)])
def test_sums_over_the_shards_of_several_processes_are_those_of_one(
    new_base, tiny_records, monkeypatch, samples, world
):
    """[17]"""
    assert_shards_add_up(new_base(), tiny_records["Alpha"], monkeypatch, samples, world)


def assert_shards_add_up(base, records, monkeypatch, samples, world):
    adapters = Adapters(base.model, base.parts.target_layers, "merged", 0.0)
    context = context_of(base, adapters, {}, records, probe_batch=2)
    whole = context.collect_inputs(samples), context.collect_weight_gradients(samples)
    monkeypatch.setattr(distributed, "all_reduce", lambda tensors: None)
    told = {}  # what rank 0, which runs first here, tells the others
    monkeypatch.setattr(distributed, "from_main", lambda value: told.setdefault(type(value[0]), value))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    sums = None
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        own = context.collect_inputs(samples), context.collect_weight_gradients(samples)
        tensors = [{layer: [t.clone() for t in a.tensors()] for layer, a in kind.items()} for kind in own]
        if sums is None:
            sums = tensors
        else:
            for total, part in zip(sums, tensors, strict=True):
                for layer in total:
                    for t, added in zip(total[layer], part[layer], strict=True):
                        t.add_(added)
    for total, expected in zip(sums, whole, strict=True):
        for layer, accumulator in expected.items():
            values, totals = accumulator.tensors()
            assert torch.allclose(total[layer][0], values, rtol=1e-4, atol=1e-5 * float(values.abs().max()))
            assert torch.allclose(total[layer][1], totals, rtol=1e-6)


def test_the_same_records_give_the_same_a(new_base, tiny_records):
    """[19]"""
    starts = []
    for probe_batch in (3, 3, 8):
        base = new_base()
        adapters, kept, strategy = Adapters(base.model, base.parts.target_layers, "merged", 0.0), {}, KeepLoRA(OPTIONS)
        strategy.prepare(context_of(base, adapters, kept, [], -1))
        strategy.before_domain(context_of(base, adapters, kept, tiny_records["Alpha"], probe_batch=probe_batch))
        starts.append(adapters.branch.A)
    for layer in starts[0]:
        assert torch.equal(starts[0][layer], starts[1][layer])
        assert torch.allclose(starts[0][layer], starts[2][layer], atol=1e-3), "batches may only round differently"


def test_an_exhausted_space_gives_fewer_directions_at_the_same_scale_and_never_one_inside(
    new_base, tiny_records, tmp_path
):
    """[20]"""
    base = new_base()
    free = dict(zip(base.parts.target_layers, (0, 1, 2, 3, RANK, 10), strict=False))
    kept, generator = {}, torch.Generator().manual_seed(0)
    for layer, module in modules_of(base).items():
        d_in = module.in_features
        columns = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
        kept[layer] = Basis.from_columns(columns[:, : d_in - free.get(layer, 2)])
    adapters, strategy = Adapters(base.model, base.parts.target_layers, "merged", 0.0), KeepLoRA(OPTIONS)
    before = columns_of(kept)
    context = context_of(base, adapters, kept, tiny_records["Alpha"])
    strategy.before_domain(context)
    for layer in base.parts.target_layers:
        room = free.get(layer, 2)
        assert (layer in adapters.branch.A) == (room > 0)
        assert context.facts["gradient"][layer]["rank"] == min(room, RANK)
        if room:
            A = adapters.branch.A[layer].double().numpy()
            assert A.shape[0] == min(room, RANK)
            assert np.linalg.norm(A @ before[layer], axis=1).max() < TOLERANCE
            assert np.linalg.norm(A @ A.T - np.eye(len(A)), 2) < TOLERANCE
            assert adapters.branch.alpha[layer] / A.shape[0] == pytest.approx(ALPHA / RANK)
    fit(strategy, context, tmp_path, epochs=0.5)
    factors = adapters.read()
    assert factors.B.keys() == adapters.branch.A.keys() and len(factors.B) == 15
    for layer in factors.B:
        assert subspace.leak(factors.delta(layer).numpy(), before[layer]) < TOLERANCE
    strategy.after_domain(context)
    for layer, basis in kept.items():
        assert basis.rank <= basis.d_in
        assert np.array_equal(basis.columns[:, : before[layer].shape[1]].double().numpy(), before[layer])


def test_a_kept_basis_of_a_bfloat16_model_still_keeps_its_update_out(new_base, tiny_records, tmp_path):
    """[2, 8] for a model in bf16: A and B stay float32 beside it."""
    base = new_base(dtype="bfloat16")
    adapters, kept, strategy = Adapters(base.model, base.parts.target_layers, "auto", 0.0), {}, Scaled(OPTIONS)
    assert adapters.mode == "factors"
    strategy.prepare(context_of(base, adapters, kept, [], -1))
    context = context_of(base, adapters, kept, tiny_records["Alpha"])
    strategy.before_domain(context)
    fit(strategy, context, tmp_path, epochs=0.5)
    factors, moved = adapters.read(), 0
    for layer in adapters.layers:
        running = base.model.get_submodule(layer).lora_A["domain"].weight
        assert running.dtype == torch.float32 and torch.equal(running, factors.A[layer])
        assert np.linalg.norm(factors.A[layer].double().numpy() @ columns_of(kept)[layer], 2) < TOLERANCE
        assert subspace.leak(factors.delta(layer).numpy(), columns_of(kept)[layer]) < TOLERANCE
        moved += bool(factors.B[layer].any())
        facts = context.facts["gradient"][layer]
        shares = gradient_capture(torch.randn(3, kept[layer].d_in), kept[layer], factors.A[layer])
        assert facts.keys() - {"rank", "kept"} == shares.keys()
    assert moved == 16


def test_more_processes_than_records_change_nothing(new_base, tiny_records, monkeypatch):
    """[17]"""
    assert_shards_add_up(new_base(), tiny_records["Alpha"], monkeypatch, 2, 3)
