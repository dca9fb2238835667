"""O-LoRA: a branch for each domain, softly held orthogonal to the input directions of the earlier ones by a penalty.

Everything is plain sequential LoRA with fresh branches (IncLoRA) but for a term added to the loss, over all layers:

    lambda1 sum_{i<t} sum_{j,k} |(A_i A_t^T)_jk| + lambda2 (||A_t||_F + ||B_t||_F)

with A of peft's naming: rows of A are input directions. Nothing is projected, no data is kept.
Source: O-LoRA (EMNLP Findings 2023, arXiv 2310.14152) and its code (cmnfriend/O-LoRA, 07117e1), whose sum of absolute
values is the default. Departures: earlier branches are merged, so LoRA dropout acts on the newest alone; the penalty is
always divided by the accumulated micro-batches, as under DeepSpeed there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies.base import Branch, Context, Need, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch

if TYPE_CHECKING:
    from torch import Tensor


class OLoRAOptions(StrategyOptions):
    """Defaults are those of the published code for T5 and LLaMA (query and value layers alone).

    The penalty is a sum over layers, so `lambda1` does not carry over to a model with more of them: MCITlib takes 0.05
    for the 224 linear layers of LLaVA-1.5-7B (presets; its implementation is another, see its code). A list gives one
    number per domain, as the published order of 15 tasks has it. LAMDA-CL/Prism keeps 0.5 for those layers (`prism` on
    UCIT, `prism-coin` on CoIN: 96 and 64 columns divided by the domains); its A begins at a deviation of 0.01.
    """

    rank: int = Field(8, ge=1)
    alpha: float = Field(32.0, gt=0.0)
    lambda1: float | list[float] = 0.5
    lambda2: float | list[float] = 0.0
    penalty: Literal["l1", "l2sq"] = Field("l1", description="of A_i A_t^T; l2sq = sum of squares")

    @field_validator("lambda1", "lambda2")
    @classmethod
    def _not_negative(cls, value: float | list[float]) -> float | list[float]:
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(0.0 <= number < float("inf") for number in numbers):
            raise ValueError("must be at least 0 and finite, a number or a list with one per domain")
        return value


class OLoRA(Strategy):
    """Stores the branches; their A are what the penalty needs."""

    Options: ClassVar[type[StrategyOptions]] = OLoRAOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mllm_dcl": {"rank": 32, "alpha": 64.0, "lambda1": 0.05},
        "ucit": {"rank": 16, "alpha": 32.0, "lambda1": 0.05},
        "prism": {"rank": 16, "alpha": 64.0, "lambda1": 0.5},
        "prism-coin": {"rank": 8, "alpha": 32.0, "lambda1": 0.5},
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"parameters"})
    options: OLoRAOptions

    def __init__(self, options: OLoRAOptions):
        super().__init__(options)
        self._trained: dict[str, dict[str, Tensor]] = {}  # layer -> parameters A and B
        self._past: dict[str, Tensor] = {}  # layer -> A of all earlier domains, where the parameters are

    def before_domain(self, context: Context) -> Branch:
        self.load_state_dict({})
        self._lambdas(context)  # lists that are too short are refused before anything is trained
        return fresh_branch(context, self.options)

    def extra_loss(self, context: Context, batch: Mapping[str, Any], outputs: Any, step: Step) -> Tensor | float:
        lambda1, lambda2 = self._lambdas(context)
        if not self._trained:
            parameters = context.branches.trainable()
            for layer in context.layers.names:
                names = {part: f"base_model.model.{layer}.lora_{part}.domain.weight" for part in ("A", "B")}
                self._trained[layer] = {part: parameters[name] for part, name in names.items()}
            self._past = _past_by_layer(context, self._trained)
        total: Tensor | float = 0.0
        if lambda1:
            for layer, past in self._past.items():
                total = total + lambda1 * overlap(past, self._trained[layer]["A"], self.options.penalty)
        if lambda2:
            for pair in self._trained.values():
                total = total + lambda2 * (pair["A"].float().norm() + pair["B"].float().norm())
        return total

    def after_domain(self, context: Context) -> None:
        """Log how far each layer's finished A overlaps with the earlier ones: its part of the penalty over lambda1."""
        trained = context.branches.read()
        past = _past_by_layer(context, {layer: {"A": A} for layer, A in trained.A.items()})
        found = {layer: float(overlap(past[layer], trained.A[layer], self.options.penalty)) for layer in past}
        if found:
            context.log({"overlap": found, "overlap_per_layer": sum(found.values()) / len(found)})

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Let go of what was gathered from another domain's branches; nothing is stored."""
        self._trained, self._past = {}, {}

    def _lambdas(self, context: Context) -> list[float]:
        """Both weights of the penalty in this domain."""
        found = []
        for name in ("lambda1", "lambda2"):
            value, index = getattr(self.options, name), context.domain.index
            if isinstance(value, list) and index >= len(value):
                raise UserError(
                    f"strategy.{name} lists {len(value)} numbers, but {context.domain.name} is domain "
                    f"{index + 1} of the sequence"
                )
            found.append(value[index] if isinstance(value, list) else value)
        return found


def overlap(past: Tensor, A: Tensor, penalty: str) -> Tensor:
    """Measure how far two sets of input directions overlap: the sum of |past A^T|, or of its squares.

    Args:
        past: (k, d_in) float32, rows of all earlier A, fixed.
        A: (r, d_in), the one being trained.
        penalty: `l1` or `l2sq`.

    Returns:
        A scalar, 0 where every row of A is orthogonal to all of `past`.

    Source: O-LoRA, the loss of its code (l1); the squared form is what its paper is understood to use.
    """
    products = past @ A.float().mT
    return products.abs().sum() if penalty == "l1" else products.square().sum()


def _past_by_layer(context: Context, trained: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """All earlier A of each layer as one, on the device of the trained one."""
    import torch

    past = context.branches.past
    if not past:
        return {}
    joined = {layer: torch.cat([factors.A[layer] for factors in past]) for layer in trained}
    return {layer: A.to(trained[layer]["A"].device) for layer, A in joined.items()}
