"""A pool of rank-1 experts: votes, masks, what a training step adds and learns, against the slow reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Branch, mixers
from mllm_keeplora.adapters.mixers.mixing import mixer_of
from mllm_keeplora.adapters.mixers.pool import Pool, leading
from tests.oracles import dac as oracle
from tests.unit.adapters.conftest import HISTORIES, adapt, random_factors
from tests.unit.conftest import logits_of

EXPERTS, ACTIVE, ALPHA = 5, 3, 10.0


def drawn(inputs, learns=False, seed=0):
    pool = Pool(EXPERTS, ACTIVE, inputs, learns)
    pool.begin(torch.Generator().manual_seed(seed))
    return pool


def opened(base, history="merged", past=(), learns=False):
    """An open branch whose B has learnt, and a pool over it, in use as of random votes."""
    adapters, generator = adapt(base, history), torch.Generator().manual_seed(7)
    adapters.restore(list(past), [])
    A = {
        n: torch.randn(EXPERTS, base.model.get_submodule(n).in_features, generator=generator) / 4
        for n in adapters.layers
    }
    pool = drawn({layer: each.shape[1] for layer, each in A.items()}, learns)
    adapters.open(Branch(A, dict.fromkeys(A, ALPHA), ("A", "B"), mixer=pool))
    factors = adapters.read()
    factors.B = {layer: 0.3 * torch.randn(each.shape, generator=generator) for layer, each in factors.B.items()}
    adapters.load(factors, {})
    votes = torch.randint(0, 9, (len(A), EXPERTS), generator=generator)
    adapters.mixer.use(votes)
    return adapters, factors, votes


def looked_at(adapters, batch, training=False):
    adapters.look_at(batch)
    if not training:
        return logits_of(adapters.model, batch)
    adapters.model.train()
    adapters.look_at(batch)
    return adapters.model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def test_each_question_votes_for_its_likeliest_experts_and_idle_ones_do_not():
    generator = torch.Generator().manual_seed(1)
    pool = drawn({"a.b": 6, "c": 4})
    phis = {layer: torch.randn(7, width, generator=generator) for layer, width in pool.inputs.items()}
    may = torch.tensor([True, True, False, True, True, False, True])
    found = pool.votes({layer: (phi, may) for layer, phi in phis.items()})
    for row, layer in enumerate(("a.b", "c")):
        R, c = (each.detach().double().numpy() for each in pool.router(layer).parameters())
        assert np.abs(R).max() > 0.1 and np.abs(c).max() > 0.1
        wanted = oracle.votes(phis[layer][may].double().numpy(), R, c, ACTIVE)
        assert found[row].tolist() == wanted.tolist() and found[row].sum() == ACTIVE * 5
    # a question's votes are its own: in another order, or one by one, they are the same
    order = torch.tensor([6, 2, 0, 4, 1, 5, 3])
    again = pool.votes({layer: (phi[order], may[order]) for layer, phi in phis.items()})
    alone = sum(pool.votes({layer: (phi[[n]], may[[n]]) for layer, phi in phis.items()}) for n in range(7))
    assert torch.equal(again, found) and torch.equal(alone, found)
    # a layer that no question reaches has none
    assert pool.votes({"c": (phis["c"], may)})[0].tolist() == [0] * EXPERTS


@pytest.mark.parametrize("number", [1, 2, 4])
def test_of_equal_experts_the_first_lead(number):
    counts = torch.tensor([[2, 5, 5, 0], [1, 1, 1, 1], [0, 0, 7, 7]])
    for row, chosen in zip(counts, leading(counts, number), strict=True):
        wanted = np.flatnonzero(oracle.leading(row.tolist(), number))
        assert chosen.tolist() == wanted.tolist()


def test_a_training_step_uses_the_experts_with_most_votes_and_teaches_no_other(base, batch):
    adapters, factors, votes = opened(base)
    seen = {}

    def keep(layer):
        def hook(module, args, output):
            plain = torch.nn.functional.linear(args[0], module.base_layer.weight, module.base_layer.bias)
            output.retain_grad()
            seen[layer] = args[0].detach().flatten(0, -2), (output - plain).detach().flatten(0, -2), output

        return hook

    for layer in adapters.layers:
        adapters.base.get_submodule(layer).register_forward_hook(keep(layer))
    looked_at(adapters, batch, training=True).square().mean().backward()
    assert len(seen) == len(adapters.layers)
    for layer, (x, added, output) in seen.items():
        row = adapters.layers.index(layer)
        mask = oracle.leading(votes[row].tolist(), ACTIVE)
        A, B = (part[layer].double().numpy() for part in (factors.A, factors.B))
        x, g = x.double().numpy(), output.grad.flatten(0, -2).double().numpy()
        wanted = oracle.added(x, A, B, ALPHA / EXPERTS, mask)
        assert np.abs(wanted).max() > 1e-3 and np.abs(added.numpy() - wanted).max() < 1e-5 * max(
            1, np.abs(wanted).max()
        )
        module = adapters.base.get_submodule(layer)
        for found, slow, axis in zip(
            (module.lora_A["domain"].weight.grad, module.lora_B["domain"].weight.grad),
            oracle.gradients(x, g, A, B, ALPHA / EXPERTS, mask),
            (1, 0),
            strict=True,
        ):
            assert np.allclose(found, slow, atol=1e-5 * max(1, np.abs(slow).max()))
            assert (found.abs().sum(dim=axis) > 0).tolist() == (mask > 0).tolist(), layer


def test_a_branch_that_has_learnt_nothing_moves_its_b_first(base, batch):
    adapters, factors, _ = opened(base)
    adapters.load(type(factors)(factors.A, {n: 0 * each for n, each in factors.B.items()}, factors.alpha), {})
    looked_at(adapters, batch, training=True).square().mean().backward()
    for layer in adapters.layers:
        module = adapters.base.get_submodule(layer)
        assert not module.lora_A["domain"].weight.grad.any()
        assert (module.lora_B["domain"].weight.grad.abs().sum(dim=0) > 0).sum() == ACTIVE


@pytest.mark.parametrize("history", HISTORIES)
def test_outside_of_a_training_all_experts_answer_or_none_over_the_past_as_it_was(base, batch, history):
    past = [random_factors(base, 1)]
    adapters, factors, _ = opened(base, history, past)
    whole = looked_at(adapters, batch)
    with adapters.mixer.silent():
        none = looked_at(adapters, batch)
        assert torch.equal(looked_at(adapters, batch, training=True), none)
    some = looked_at(adapters, batch, training=True).detach()
    assert not torch.allclose(some, whole, atol=1e-2) and not torch.allclose(some, none, atol=1e-2)
    adapters.assert_plan()
    adapters.restore([*past, factors], [])
    assert torch.allclose(logits_of(adapters.model, batch), whole, atol=1e-4)
    adapters.restore(past, [])
    assert torch.allclose(logits_of(adapters.model, batch), none, atol=1e-5) and mixer_of(adapters.model) is None


def test_a_pool_is_not_asked_before_its_first_vote(base, batch):
    adapters = opened(base)[0]
    adapters.mixer.masks = None
    looked_at(adapters, batch)
    with pytest.raises(AssertionError, match="before its first vote"):
        looked_at(adapters, batch, training=True)


def test_routers_that_learn_pass_the_gradient_of_an_experts_share_on_to_its_chance():
    pool, phi = drawn({"a": 4}, learns=True), torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    pool.use(torch.tensor([[3, 1, 2, 0, 4]]))
    pool.train().seen = [{"a": phi}]
    weigh = {"labels": torch.zeros(3, 2)}
    pool.weigh(weigh, None)
    x, share = torch.zeros(3, 2, 4), torch.randn(3, 2, EXPERTS, generator=torch.Generator().manual_seed(3))
    weights = pool.of("a", x)
    assert torch.equal(weights.expand(3, 2, EXPERTS), pool.masks[0].expand(3, 2, EXPERTS)), "the forward is the same"
    (weights * share).sum().backward()
    mask, (R, c) = oracle.leading([3, 1, 2, 0, 4], ACTIVE), (p.detach().double().numpy() for p in pool.parameters())
    wanted, bias = np.zeros(R.shape), np.zeros(c.shape)
    for row in range(3):
        p, g = oracle.chances(phi[row].double().numpy(), R, c), mask * share[row].sum(dim=0).double().numpy()
        slope = g - p * g.sum()  # of sum_i g_i p_i / stop(p_i), through the softmax
        wanted, bias = wanted + np.outer(slope, phi[row].double().numpy()), bias + slope
    assert np.allclose(pool.router("a").weight.grad, wanted, atol=1e-5)
    assert np.allclose(pool.router("a").bias.grad, bias, atol=1e-5) and np.abs(bias).max() > 1e-2
    # a picture that was joined to keep step gets no gradient, nor does a router that no question reaches
    for seen in ({"a": phi}, {}):
        pool.zero_grad()
        pool.seen = [seen]
        pool.weigh({"labels": torch.zeros(4, 2)}, None)
        assert pool.seen == [], "each micro-batch takes its own"
        weights = pool.of("a", torch.zeros(4, 2, 4))
        assert torch.equal(weights.expand(4, 2, EXPERTS), pool.masks[0].expand(4, 2, EXPERTS))
        (weights[3] if seen else 0 * weights).sum().backward()
        assert not any(each.grad.any() for each in pool.parameters())
    assert drawn({"a": 4}).trained() == () and len(pool.trained()) == 2


def test_a_pool_is_made_again_of_what_is_stored_and_names_no_domain():
    pool = drawn({"a.b": 6, "c": 4}, learns=True)
    facts, tensors = pool.stored()
    again = mixers.rebuilt(facts, tensors)
    assert again.settings() == pool.settings() == facts["settings"]
    assert all(torch.equal(each, tensors[name]) for name, each in again.state_dict().items())
    assert {name.split(".")[1] for name in tensors} == {"a/b", "/c"} and len(tensors) == 4
    assert not torch.equal(drawn({"c": 4}, seed=1).router("c").weight, drawn({"c": 4}).router("c").weight)
