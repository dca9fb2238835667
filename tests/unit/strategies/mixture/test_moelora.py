"""MoELoRA: a dense mixture of experts in every layer, trained on from domain to domain; against a float64 mixture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters, Branch, Factors
from mllm_keeplora.adapters.mixers.mixing import keep_rows
from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.models.causal.decoding import greedy
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.strategies.mixture.moelora import MoELoRA, MoELoRAOptions
from tests.oracles import moelora as oracle
from tests.support.strategies import context_of, learn, open_branch
from tests.unit.conftest import encode, logits_of, snapshot

OPTIONS = MoELoRAOptions(rank=6, alpha=12.0, experts=3)
LAYERS = 16


@pytest.fixture
def opened(base, tiny_records):
    """The first domain's branch, open; B as if it had learnt, so that its experts do something."""
    adapters = Adapters(base, "merged", 0.0)
    open_branch(MoELoRA(OPTIONS), context_of(base, adapters, tiny_records, 0))
    return adapters


@pytest.fixture
def taught(base, tiny_records, tmp_path):
    """Adapters, factors and mixer after one domain, and the strategy that learnt it."""
    adapters, strategy = Adapters(base, "merged", 0.0), MoELoRA(OPTIONS)
    factors = learn(strategy, context_of(base, adapters, tiny_records, 0), tmp_path, lr=3e-2)
    return adapters, factors, strategy


@pytest.fixture
def batch(base, tiny_records):
    return encode(base, tiny_records["Beta"][:4])


def with_random_b(adapters, size=0.3):
    """The open branch's factors once its B is random."""
    generator = torch.Generator().manual_seed(3)
    start = adapters.read()
    B = {layer: size * torch.randn(each.shape, generator=generator) for layer, each in start.B.items()}
    factors = Factors(start.A, B, start.alpha)
    adapters.load(factors, {})
    return factors


def live_logits(adapters, batch):
    adapters.look_at(batch)
    return logits_of(adapters.model, batch)


def test_every_layer_adds_the_mixture_of_its_experts(base, batch, opened):
    factors, seen = with_random_b(opened), {}

    def keep(layer):
        def hook(module, args, output):
            plain = torch.nn.functional.linear(args[0], module.base_layer.weight, module.base_layer.bias)
            seen[layer] = args[0].flatten(0, -2), (output - plain).flatten(0, -2)

        return hook

    for layer in opened.layers:
        opened.base.get_submodule(layer).register_forward_hook(keep(layer))
    live_logits(opened, batch)
    assert len(seen) == LAYERS and {layer.rsplit(".", 1)[0] for layer in seen} > {"model.multi_modal_projector"}
    for layer, (x, added) in seen.items():
        router = opened.mixer.router(layer).weight.detach().double().numpy()
        A, B = factors.A[layer].double().numpy(), factors.B[layer].double().numpy()
        wanted = oracle.mixture(x[:7].double().numpy(), A, B, router, OPTIONS.alpha)
        assert np.abs(wanted).max() > 1e-3
        assert np.abs(added[:7].double().numpy() - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())
        even = oracle.mixture(x[:7].double().numpy(), A, B, 0 * router, OPTIONS.alpha)
        assert np.abs(even - wanted).max() > 1e-4, "routers that do nothing would pass"


def test_evenly_mixed_experts_are_plain_lora_of_a_share_of_the_scale(base, batch, opened):
    factors = with_random_b(opened)
    for layer in opened.layers:
        torch.nn.init.zeros_(opened.mixer.router(layer).weight)
    mixed = live_logits(opened, batch)
    opened.restore([Factors(factors.A, factors.B, {layer: OPTIONS.alpha / 3 for layer in factors.A})], [])
    assert torch.allclose(mixed, logits_of(opened.model, batch), atol=1e-4)


def test_the_first_branch_changes_nothing_and_routers_begin_within_bounds(base, tiny_records, batch):
    adapters = Adapters(base, "merged", 0.0)
    before = logits_of(adapters.model, batch)
    open_branch(MoELoRA(OPTIONS), context_of(base, adapters, tiny_records, 0))
    assert torch.allclose(live_logits(adapters, batch), before, atol=1e-5)
    for layer in adapters.layers:
        weight, bound = adapters.mixer.router(layer).weight, base.model.get_submodule(layer).in_features ** -0.5
        assert weight.shape[0] == 3 and 0.7 * bound < weight.abs().max() <= bound


def test_branch_and_routers_train_and_nothing_else(base, tiny_records, tmp_path):
    adapters, states = Adapters(base, "merged", 0.0), []

    class Watched(MoELoRA):
        def after_domain(self, context):
            states.append(snapshot(adapters.model))

        def before_domain(self, context):  # in the old form, which opens the branch itself
            adapters.open(super().before_domain(context))
            states.append(snapshot(adapters.model))
            self.listed = set(adapters.trainable())

    strategy = Watched(OPTIONS)
    learn(strategy, context_of(base, adapters, tiny_records, 0), tmp_path)
    opened, trained = states
    changed = {name for name, value in trained.items() if not torch.equal(value, opened[name])}
    assert changed == strategy.listed
    kinds = [name.split(".lora_")[-1][0] if ".lora_" in name else "router" for name in changed]
    assert sorted(kinds) == sorted(["A", "B", "router"] * LAYERS)


def test_the_next_domain_trains_the_same_experts_and_routers_on(base, tiny_records, tmp_path, batch, taught):
    adapters, factors, strategy = taught
    before, last = live_logits(adapters, batch), adapters.past_mixer
    context = context_of(base, adapters, tiny_records, 1)
    open_branch(strategy, context)
    branch = adapters.branch
    assert branch.carried and branch.train == ("A", "B")
    for layer in adapters.layers:
        assert torch.equal(branch.A[layer], factors.A[layer]) and torch.equal(branch.B[layer], factors.B[layer])
        assert torch.equal(branch.mixer.router(layer).weight, last.router(layer).weight)
    assert torch.allclose(live_logits(adapters, batch), before, atol=1e-5)
    assert sum(name.startswith("base_model.model.branch_mixer.") for name in adapters.trainable()) == LAYERS
    kept = last.router(adapters.layers[0]).weight.clone()
    adapters.restore([factors], [], last)
    learn(strategy, context, tmp_path / "next")
    assert len(adapters.past) == 1 and not torch.equal(
        adapters.past[0].A[adapters.layers[0]], factors.A[adapters.layers[0]]
    )
    assert not torch.equal(adapters.past_mixer.router(adapters.layers[0]).weight, kept)
    assert torch.equal(last.router(adapters.layers[0]).weight, kept), "what an earlier domain left stays as it was"


def test_an_open_branch_comes_back_from_its_file(opened, tmp_path):
    branch = opened.branch
    branch.save(tmp_path / "init.safetensors")
    state = torch.get_rng_state()
    loaded = Branch.load(tmp_path / "init.safetensors")
    assert torch.equal(torch.get_rng_state(), state), "reading a file draws nothing"
    assert loaded.mixer.settings() == branch.mixer.settings() and loaded.mixer.trained() == branch.mixer.trained()
    for layer in opened.layers:
        assert torch.equal(loaded.mixer.router(layer).weight, branch.mixer.router(layer).weight)


def test_answers_in_a_batch_are_those_of_each_question_alone(base, batch, taught):
    adapters = taught[0]

    def answers(rows):
        asked = {name: value[rows] for name, value in batch.items() if name != "labels"}
        asked["attention_mask"] = torch.ones_like(asked["attention_mask"])
        adapters.look_at(asked)
        with torch.inference_mode():
            return greedy(adapters.model, asked, 8, range(0, 8), 0, keep_rows(adapters.base)).tokens

    together = answers([0, 1, 2, 3])
    for row in range(4):
        alone = answers([row])[0]
        assert torch.equal(alone, together[row, : len(alone)])


def test_a_cache_changes_no_logits(base, tiny_records, taught):
    adapters = taught[0]
    batch = {name: value for name, value in encode(base, tiny_records["Beta"][:1]).items() if name != "labels"}
    whole, start = live_logits(adapters, batch)[0], batch["input_ids"].shape[1] - 4
    tokens = batch["input_ids"]
    first = {**batch, "input_ids": tokens[:, :start], "attention_mask": batch["attention_mask"][:, :start]}
    adapters.look_at(first)
    with torch.no_grad():
        found = adapters.model(**first, use_cache=True)
        steps = [found.logits[0, -1]]
        for place in range(start, tokens.shape[1]):
            found = adapters.model(input_ids=tokens[:, place : place + 1], past_key_values=found.past_key_values)
            steps.append(found.logits[0, -1])
    assert torch.allclose(torch.stack(steps), whole[start - 1 :], atol=1e-4)


@pytest.mark.parametrize(("options", "rank", "experts"), [({"rank": 16, "experts": 5}, 16, 5), ({"rank": 12}, 12, 8)])
def test_a_rank_that_does_not_divide_into_the_experts_is_refused_naming_both(options, rank, experts):
    with pytest.raises(UserError, match=f"strategy.experts.*rank {rank}.*got {experts}"):
        build_strategy(StrategyConfig(name="moelora", **options))


PRESETS = {
    "mllm_dcl": (35, 70.0, 5),
    "ucit": (18, 36.0, 6),
    "clmoe-mcitlib": (160, 320.0, 5),
    "clmoe-mcitlib-ucit": (96, 192.0, 6),
    "clmoe-mcitlib-acl": (128, 256.0, 4),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_those_of_mcitlib_and_train_as_many_numbers(base, tiny_records, preset):
    """Over all layers: rank (d_in + d_out) of the experts, and experts d_in of the router."""
    strategy, adapters = build_strategy(StrategyConfig(name="moelora", preset=preset)), Adapters(base, "merged", 0.0)
    options = strategy.options
    assert (options.rank, options.alpha, options.experts) == PRESETS[preset] and options.alpha == 2 * options.rank
    assert PRESETS.keys() == MoELoRA.presets.keys()
    context = context_of(base, adapters, tiny_records, 0)
    open_branch(strategy, context)
    sizes = [(context.layers.d_in(layer), context.layers.d_out(layer)) for layer in context.layers.names]
    rank, _, experts = PRESETS[preset]
    wanted = sum(rank * (d_in + d_out) + experts * d_in for d_in, d_out in sizes)
    assert sum(parameter.numel() for parameter in adapters.trainable().values()) == wanted


def test_a_single_expert_is_a_branch_that_is_carried_on(new_base, tiny_records, tmp_path):
    learnt = []
    shape = {"rank": 6, "alpha": 12.0}
    for strategy in (
        MoELoRA(MoELoRAOptions(**shape, experts=1)),
        Finetune(FinetuneOptions(**shape, branch="carried")),
    ):
        base = new_base()
        adapters = Adapters(base, "merged", 0.0)
        for index in range(2):
            context = context_of(base, adapters, tiny_records, index)
            factors = learn(strategy, context, tmp_path / f"{len(learnt)}-{index}")
        learnt.append(factors)
    mixed, plain = learnt
    for layer in plain.A:
        assert torch.allclose(mixed.A[layer], plain.A[layer], atol=1e-4), layer
        assert torch.allclose(mixed.B[layer], plain.B[layer], atol=1e-4), layer
        assert plain.B[layer].abs().max() > 1e-2
