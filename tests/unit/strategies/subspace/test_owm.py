"""OWM-LoRA: P against recursive least squares over single inputs, and what steps of A are multiplied by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.models.family import Sizes
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.footprint import PassSizes
from mllm_keeplora.strategies.subspace.owm import OWM, OWMOptions, taken_in
from mllm_keeplora.system.files import read_tensors, write_tensors
from tests.oracles import owm as oracle
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.adapters.conftest import HISTORIES, adapt
from tests.unit.conftest import captured_tokens, encode

RIDGE = 0.05
SGD = {"schedule": "constant", "warmup_ratio": 0.0, "max_grad_norm": 0.0, "batch_size": 12, "args": {"optim": "sgd"}}


def strategy_of(kind=OWM, **options) -> OWM:
    values = {"rank": 4, "alpha": 8.0, "ridge": RIDGE, "feature_samples": 12, "first_token": True}
    return kind(OWMOptions(**{**values, **options}))


class Watched(OWM):
    """Notes A and its gradient as the optimizer finds them, step by step."""

    def __init__(self, options):
        super().__init__(options)
        self.steps = []

    def around_step(self, context, phase, step):
        if phase == "grad":
            trained = {n: p for n, p in context.branches.trainable().items() if ".lora_A." in n}
            self.steps.append({name: (p.detach().clone(), p.grad.clone()) for name, p in trained.items()})
        super().around_step(context, phase, step)


def second_domain(base, records, folder, kind=OWM, history="merged", **options):
    """A strategy after the first domain, and the context of the second."""
    adapters, strategy = adapt(base, history), strategy_of(kind, **options)
    learn(strategy, context_of(base, adapters, records, 0), folder / "first")
    return strategy, context_of(base, adapters, records, 1)


def layer_of(name: str) -> str:
    return name.removeprefix("base_model.model.").split(".lora_")[0]


def test_a_domain_at_once_is_taken_in_as_its_inputs_one_by_one():
    generator = torch.Generator().manual_seed(0)
    domains, P = [torch.randn(n, 9, generator=generator) * size for n, size in ((4, 1.0), (20, 30.0), (3, 1e-3))], None
    for number, rows in enumerate(domains):
        P = taken_in(P, rows.mT @ rows, RIDGE)
        wanted = oracle.projection([each.numpy() for each in domains[: number + 1]], RIDGE)
        assert P.dtype == torch.float32 and torch.equal(P, P.mT) and np.allclose(P, wanted, atol=1e-5)
        values = torch.linalg.eigvalsh(P)
        assert values.min() > 0 and values.max() < 1 + 1e-5
    mean = taken_in(None, domains[0].mT @ domains[0] / 4, RIDGE)
    assert torch.allclose(mean, taken_in(None, domains[0].mT @ domains[0], RIDGE), atol=1e-6)
    assert torch.equal(taken_in(None, torch.zeros(3, 3), RIDGE), torch.eye(3))


@pytest.mark.parametrize("history", HISTORIES)
def test_every_layer_takes_in_what_each_domain_sends(base, tiny_records, tmp_path, history):
    adapters, strategy, seen = adapt(base, history), strategy_of(), []
    for index, (name, records) in enumerate(tiny_records.items()):
        context = context_of(base, adapters, tiny_records, index)
        open_branch(strategy, context)
        fit(strategy, context, tmp_path / name)
        modules = {layer: base.model.get_submodule(layer) for layer in base.parts.target_layers}
        seen.append(captured_tokens(adapters.model, modules, [encode(base, [record]) for record in records]))
        strategy.after_domain(context)
        adapters.restore([*adapters.past, adapters.read()], [])
        for layer in list(modules)[::3]:
            wanted = oracle.projection([tokens[layer] for tokens in seen], RIDGE)
            assert np.allclose(strategy.P[layer], wanted, atol=2e-4), layer
        assert all(0 < share < 1 for share in context.facts["free_share"].values())
    assert len(strategy.P) == 16 and len(context.facts["free_share"]) == len(strategy.state_dict()) == 10


def test_a_starts_shrunk_where_past_inputs_have_energy_with_rows_as_long_as_before(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, tmp_path)
    plain = fresh_branch(context_of(base, context.branches, tiny_records, 1), strategy.options)
    begun = strategy.before_domain(context)
    assert begun.train == ("A", "B") and not begun.B and begun.alpha == plain.alpha
    for layer, A in begun.A.items():
        assert np.allclose(A, oracle.opened(plain.A[layer], strategy.P[layer].double().numpy()), atol=1e-5)
        assert not torch.allclose(A, plain.A[layer], atol=1e-3)


@pytest.mark.parametrize("mode", ["post", "grad"])
def test_under_plain_gradient_descent_both_modes_are_the_published_rule(base, tiny_records, tmp_path, mode):
    strategy, context = second_domain(base, tiny_records, tmp_path, Watched, mode=mode)
    open_branch(strategy, context)
    strategy.steps.clear()
    fit(strategy, context, tmp_path / "second", epochs=2.0, lr=0.1, **SGD)
    (_, last), now = strategy.steps, context.branches.trainable()
    assert len(last) == 16
    for name, (A, gradient) in last.items():
        wanted = oracle.step(A, gradient, 0.1, strategy.P[layer_of(name)].double().numpy())
        assert np.allclose(now[name].detach(), wanted, atol=1e-6) and not np.array_equal(wanted, A.numpy())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_under_adam_every_change_of_a_lies_in_what_p_leaves(base, tiny_records, tmp_path, weight_decay):
    strategy, context = second_domain(base, tiny_records, tmp_path, Watched)
    open_branch(strategy, context)
    strategy.steps.clear()
    fit(strategy, context, tmp_path / "second", epochs=2.0, weight_decay=weight_decay)
    ends = [*strategy.steps[1:], {n: (p.detach(), None) for n, p in context.branches.trainable().items() if "_A." in n}]
    for number, (before, after) in enumerate(
        zip(strategy.steps, ends, strict=True)
    ):  # the first two have no rate or no gradient
        for name, (A, _) in before.items():
            change, P = (after[name][0] - A).double(), strategy.P[layer_of(name)].double()
            step = torch.linalg.solve(P, change.mT).mT  # what the optimizer did
            assert step.abs().max() < 2e-2, "no more than Adam's step, at a rate of 1e-2"
            assert number < 2 or step.norm() > change.norm() > 0
    assert len(ends) == 6


def test_past_inputs_hear_less_of_what_is_learnt_the_smaller_the_ridge(new_base, tiny_records, tmp_path):
    heard = {}
    for ridge in (1e-4, 1e-1, 1e4):
        base = new_base()
        strategy, context = second_domain(base, tiny_records, tmp_path / str(ridge), ridge=ridge)
        modules = {layer: base.model.get_submodule(layer) for layer in base.parts.target_layers}
        samples = [encode(base, [record]) for record in tiny_records["Alpha"]]
        tokens = captured_tokens(context.branches.model, modules, samples)
        factors = learn(strategy, context, tmp_path / str(ridge) / "second")
        shares = []
        for layer, A in factors.A.items():
            A, rows = A.double().numpy(), tokens[layer]
            shares.append(np.linalg.norm(rows @ A.T) / np.linalg.norm(rows) / np.linalg.norm(A))
        heard[ridge] = np.mean(shares)
    assert heard[1e-4] < 0.4 * heard[1e-1] < 0.2 * heard[1e4]


def test_what_was_taken_in_survives_a_stop_one_tensor_an_input(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, tmp_path)
    write_tensors(tmp_path / "state.safetensors", strategy.state_dict())
    later = strategy_of()
    later.load_state_dict(read_tensors(tmp_path / "state.safetensors"))
    assert all(torch.equal(P, later.P[layer]) for layer, P in strategy.P.items())
    assert len({id(P) for P in later.P.values()}) == len({id(P) for P in strategy.P.values()}) == 10
    later.load_state_dict({})
    plain = fresh_branch(context_of(base, context.branches, tiny_records, 1), strategy.options)
    begun = later.before_domain(context)
    assert all(torch.equal(A, plain.A[layer]) for layer, A in begun.A.items())


def test_layers_of_one_input_that_had_others_before_go_on_from_their_own(base, tiny_records, tmp_path):
    strategy, context = second_domain(base, tiny_records, tmp_path)
    group = next(group for group in context.layers.groups() if len(group) > 1)
    shared, apart = group[0], group[1]
    strategy.P[apart] = torch.eye(len(strategy.P[apart]))
    open_branch(strategy, context)
    strategy.after_domain(context)
    alone = strategy_of()
    alone.after_domain(context)
    assert torch.allclose(strategy.P[apart], alone.P[apart], atol=1e-5)
    assert (strategy.P[shared] - strategy.P[apart]).abs().max() > 1e-2


def test_what_a_step_gives_no_gradient_is_left_alone(base, tiny_records, tmp_path):
    """As the projector after a step without pictures."""
    strategy, context = second_domain(base, tiny_records, tmp_path, mode="grad")
    open_branch(strategy, context)
    strategy.around_step(context, "grad", None)
    assert all(parameter.grad is None for parameter in context.branches.trainable().values())


def test_the_estimate_has_one_projection_for_each_distinct_input():
    wide = Sizes(saved=1.0, input_widths=(8, 6), blocks=1, width=8, loss=1.0, cached=1.0, text=0.0)
    found = strategy_of().footprint(PassSizes(wide, ((4, 8), (5, 6)), 3, 100, 10, 1.0, 4, 8, 1, 1, (1, 1)))
    assert found["always"] == found["train"] == {"projections": 4 * (64 + 36)} and "moments" in found["consolidate"]


@pytest.mark.parametrize(("option", "value"), [("ridge", 0.0), ("mode", "pre"), ("feature_samples", 1.5)])
def test_options_out_of_range_are_refused_in_words(option, value):
    with pytest.raises(UserError, match=rf"strategy\.{option}"):
        build_strategy(StrategyConfig(name="owm", **{option: value}))


def test_it_needs_gradients_between_backward_and_step():
    assert build_strategy(StrategyConfig(name="owm")).needs == {"gradients"}
