"""GainLoRA's options, and those of the method that it wraps."""

from __future__ import annotations

import pytest

from mllm_keeplora.config import StrategyConfig
from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies import build_strategy
from mllm_keeplora.strategies.mixture.gainlora import GainLoRA
from mllm_keeplora.strategies.mixture.gainlora_options import GainLoRAOptions


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base": "keeplora"}, r"strategy\.base: .*must be one of gpm, inflora, olora"),
        ({"base_options": {"rank": 3}}, r"base_options: .*rank is shared with the gated method: set strategy\.rank"),
        ({"base": "gpm", "base_options": {"energy": 2.0}}, r"base_options: .*gpm refuses them: energy: .*less than"),
        (
            {"base": "olora", "base_options": {"magic": 1}},
            r"base_options: .*olora refuses them: magic is not a known key of olora",
        ),
        ({"gate_samples": 1.5}, "whole number of records"),
        ({"gate_energy": 1.5}, r"strategy\.gate_energy: .*less than or equal to 1"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options, said):
    with pytest.raises(UserError, match=said):
        build_strategy(StrategyConfig(name="gainlora", **options))


def test_the_base_method_has_its_own_options_beside_the_shared_rank_and_alpha():
    options = GainLoRAOptions(rank=3, alpha=7.0, base="inflora", base_options={"energy": 0.5})
    own = GainLoRA(options).base.options
    assert (own.rank, own.alpha, own.energy) == (3, 7.0, 0.5)
    assert GainLoRA(GainLoRAOptions()).base.options.energy == 0.995


def test_what_the_base_method_needs_is_needed_beside_whole_parameters():
    assert GainLoRA(GainLoRAOptions(base="inflora")).needs == {"parameters"}
    assert GainLoRA(GainLoRAOptions(base="gpm", base_options={"mode": "grad"})).needs == {"parameters", "gradients"}
