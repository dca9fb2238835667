"""MTL-LoRA: a transform for each domain between a shared A and a softmax over up-projections; against the reference."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mllm_keeplora.adapters import Adapters, Branch, Factors
from mllm_keeplora.adapters.mixers.transforms import Transform, Transforms
from mllm_keeplora.checks.engine import unfit_for
from mllm_keeplora.config import StrategyConfig, load_config
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.base import StrategyOptions
from mllm_keeplora.strategies.baselines.independent import Independent
from mllm_keeplora.strategies.mixture.mtl_lora import MTLLoRA, MTLLoRAOptions
from mllm_keeplora.system.files import read_tensors, write_tensors
from tests.oracles import mtl_lora as oracle
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.conftest import encode, logits_of

LAYERS = 16


def strategy_of(**options):
    return MTLLoRA(MTLLoRAOptions(**{"rank": 4, "alpha": 8.0, **options}))


@pytest.fixture
def batch(base, tiny_records):
    return encode(base, tiny_records["Beta"][:4])


def second(base, records, folder, **options):
    """A strategy that has learnt the first domain, and the adapters with the branch of the second open at the base."""
    adapters, strategy = Adapters(base, "merged", 0.0), strategy_of(**options)
    learn(strategy, context_of(base, adapters, records, 0), folder / "first", lr=3e-2)
    adapters.restore([], [])
    context = context_of(base, adapters, records, 1)
    open_branch(strategy, context)
    return strategy, adapters, context


def disturbed(adapters):
    """Give every number that trains a random value; the branch's factors."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapters.trainable().values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapters.read()


def live_logits(adapters, batch):
    adapters.look_at(batch)
    return logits_of(adapters.model, batch)


@pytest.mark.parametrize("form", ["full", "diag"])
def test_every_layer_adds_what_the_reference_does_and_so_does_its_pair(base, tiny_records, tmp_path, batch, form):
    strategy, adapters, _ = second(base, tiny_records, tmp_path, lambda_format=form)
    factors, seen = disturbed(adapters), {}

    def keep(layer):
        def hook(module, args, output):
            plain = torch.nn.functional.linear(args[0], module.base_layer.weight, module.base_layer.bias)
            seen[layer] = args[0].flatten(0, -2), (output - plain).flatten(0, -2)

        return hook

    for layer in adapters.layers:
        adapters.base.get_submodule(layer).register_forward_hook(keep(layer))
    live_logits(adapters, batch)
    assert len(seen) == LAYERS
    for layer, (x, added) in seen.items():
        part = adapters.mixer.layer(layer)
        A, B = factors.A[layer].double().numpy(), factors.B[layer].double().numpy()
        Bs = [strategy.ups[layer][0].double().numpy(), B]
        assert np.abs(Bs[0]).max() > 1e-3
        numbers = [each.detach().double().numpy() for each in (part.transform, part.logits)]
        wanted = [oracle.added(row, A, numbers[0], Bs, numbers[1], 0.8, 8.0) for row in x[:3].double().numpy()]
        size = np.abs(wanted).max()
        assert size > 1e-3 and np.abs(added[:3].double().numpy() - wanted).max() < 1e-5 * max(1, size)
        down, up = adapters.mixer.folded(layer, factors.A[layer], factors.B[layer])
        folded = 8.0 / 4 * (x[:3].cpu() @ down.mT @ up.mT)
        assert np.abs(folded.double().numpy() - wanted).max() < 1e-5 * max(1, size)


def test_shares_sum_to_one_and_run_from_the_largest_alone_to_the_mean():
    logits = torch.tensor([0.1, 0.4, -0.2])
    for temperature, wanted in ((1e-3, [0.0, 1.0, 0.0]), (1e4, [1 / 3] * 3), (0.8, oracle.shares(logits, 0.8))):
        part = Transform(2, 3, earlier=2, temperature=temperature, form="full")
        with torch.no_grad():
            part.logits.copy_(logits)
        assert torch.allclose(part.shares, torch.tensor(wanted, dtype=torch.float32), atol=1e-4)
        assert abs(float(part.shares.sum().detach()) - 1) < 1e-6


def test_the_first_domain_begins_at_the_base_and_a_later_one_at_a_mean_of_earlier_ups(
    base, tiny_records, tmp_path, batch
):
    adapters = Adapters(base, "merged", 0.0)
    before = logits_of(adapters.model, batch)
    open_branch(strategy_of(), context_of(base, adapters, tiny_records, 0))
    assert torch.allclose(live_logits(adapters, batch), before, atol=1e-5)
    adapters.restore([], [])
    strategy, adapters, _ = second(base, tiny_records, tmp_path)
    begun = live_logits(adapters, batch)
    shares = {layer: float(adapters.mixer.layer(layer).shares[0].detach()) for layer in adapters.layers}
    assert all(0.1 < share < 0.9 for share in shares.values()) and len(set(shares.values())) > 1
    B = {layer: share * strategy.ups[layer][0] for layer, share in shares.items()}
    adapters.restore([Factors(strategy.A, B, dict.fromkeys(B, 8.0))], [])
    assert (begun - before).abs().max() > 1e-3
    assert torch.allclose(begun, logits_of(adapters.model, batch), atol=1e-4)


def test_one_up_projection_and_the_identity_are_plain_lora(new_base, tiny_records, tmp_path):
    learnt = []
    for strategy in (strategy_of(), Independent(StrategyOptions(rank=4, alpha=8.0))):
        base = new_base()
        context = context_of(base, Adapters(base, "merged", 0.0), tiny_records, 0)
        open_branch(strategy, context)
        if context.branches.mixer is not None:
            for layer in context.branches.layers:  # gets a gradient, and stays where it is
                context.branches.mixer.layer(layer).transform.register_hook(torch.zeros_like)
        fit(strategy, context, tmp_path / type(strategy).__name__, max_grad_norm=0.0)
        learnt.append(context.branches.read())
    for layer in learnt[0].A:
        assert torch.allclose(learnt[0].A[layer], learnt[1].A[layer], atol=1e-5), layer
        assert torch.allclose(learnt[0].B[layer], learnt[1].B[layer], atol=1e-5) and learnt[0].B[layer].any()


def test_a_later_domain_trains_its_own_numbers_alone_as_many_as_published(base, tiny_records, tmp_path):
    strategy, adapters, context = second(base, tiny_records, tmp_path)
    first = {layer: A.clone() for layer, A in strategy.A.items()}
    for layer in adapters.layers:
        rank, (d_out, d_in) = 4, (strategy.ups[layer].shape[1], first[layer].shape[1])
        trained = sum(each.numel() for name, each in adapters.trainable().items() if layer in name.replace("/", "."))
        of_first = rank * d_in + rank**2 + d_out * rank + 1
        assert trained == oracle.numbers(d_in, d_out, rank, 2, 2) - of_first - 1, "w of the first has one number less"
    up = {layer: each.clone() for layer, each in strategy.ups.items()}
    fit(strategy, context, tmp_path / "second", lr=3e-2)
    strategy.after_domain(context)
    for layer in adapters.layers:
        assert torch.equal(strategy.A[layer], first[layer]) and torch.equal(strategy.ups[layer][:1], up[layer])
        assert len(strategy.ups[layer]) == 2 and strategy.ups[layer][1].any()
        assert not torch.allclose(context.replacement.factors.A[layer], first[layer]), "Lambda has trained"
    assert abs(sum(context.facts["mean_shares"]) - 1) < 1e-5 and len(context.facts["mean_shares"]) == 2


def test_what_answers_does_what_was_trained(base, tiny_records, tmp_path, batch):
    strategy, adapters, context = second(base, tiny_records, tmp_path)
    fit(strategy, context, tmp_path / "second", lr=3e-2)
    trained = live_logits(adapters, batch)
    strategy.after_domain(context)
    adapters.restore([context.replacement.factors], [])
    assert torch.allclose(logits_of(adapters.model, batch), trained, atol=1e-4)


def test_an_open_branch_and_the_state_come_back_from_files(base, tiny_records, tmp_path, batch):
    strategy, adapters, _ = second(base, tiny_records, tmp_path)
    wanted = live_logits(adapters, batch)
    adapters.branch.save(tmp_path / "init.safetensors")
    loaded = Branch.load(tmp_path / "init.safetensors")
    assert isinstance(loaded.mixer, Transforms) and loaded.train == ("B",)
    adapters.restore([], [])
    adapters.open(loaded)
    assert torch.equal(live_logits(adapters, batch), wanted)
    write_tensors(tmp_path / "strategy.safetensors", strategy.state_dict())
    again = strategy_of()
    again.load_state_dict(read_tensors(tmp_path / "strategy.safetensors"))
    adapters.restore([], [])
    open_branch(again, context_of(base, adapters, tiny_records, 1))
    assert torch.equal(live_logits(adapters, batch), wanted)
    again.load_state_dict({})
    assert again.A == again.ups == {}


def test_the_need_the_presets_and_the_estimate():
    config = load_config("mini_dcl_mtl_lora", ["deepspeed=zero3"])
    assert len(unfit_for(config, build_strategy(config.strategy), 3)) == 1
    assert unfit_for(config, build_strategy(config.strategy), 2) == []
    found = {name: build_strategy(StrategyConfig(name="mtl_lora", preset=name)).options for name in MTLLoRA.presets}
    told = {name: (each.rank, each.alpha, each.temperature) for name, each in found.items()}
    assert told == {"llama": (8, 16.0, 0.1), "vl_bart": (64, 16.0, 0.8)}
    sizes = SimpleNamespace(rank=4, layers=((10, 3), (20, 3)), domains=3)
    assert strategy_of().footprint(sizes) == {"train": {"earlier up-projections": 4 * 4 * 30 * 2}}


def test_a_layer_without_dots_lends_its_transform_another_name():
    """Else peft, which matches the ends of names, would adapt what is inside of the mixer, too."""
    mixer = Transforms({"visual_projection": (2, 4), "a.b": (2, 4)}, earlier=0, temperature=1.0, form="full")
    assert set(mixer.layers) == {"/visual_projection", "a/b"}
