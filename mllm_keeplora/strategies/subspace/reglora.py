"""RegLoRA: a branch for each domain, kept small in those entries of the weights that earlier branches changed most.

Everything is plain sequential LoRA with fresh branches but for a term added to the loss. After a domain, the `share` of
entries with the largest |B_t A_t| is marked in each of the N layers, K = K_1 u .. u K_t, and the next domains pay

    strength / N * sum over layers of  mean over (i, j) in K of |(B A)_ij|

for the branch being trained, without its scale alpha / r. No data is kept, and no product is ever whole: both gradients
are closed, strength / (N |K|) times S A^T and B^T S with S = sign(B A) on K, 0 elsewhere (`linalg.marked`).

Source: the weight part of SEFE (ICML 2025, arXiv 2505.02486) and its code (jinpeng0528/SEFE, 2f61efe), which MCITlib
runs as "SEFE" on unchanged data. SEFE's other part, answers rewritten into other styles, is a data set.
Departures: that code lists entries, so those marked by several domains weigh as often (`overlap: multiset`); by default
they count once. Under gradient checkpointing it computes the penalty twice. Of equal entries the first are marked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.strategies.base import Branch, Context, Need, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.footprint import Footprint, PassSizes

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 24 * 2**22  # bytes beside factors and marks, of six float32 numbers for each entry of a chunk
PLANES = 4  # bits that count how often an entry was marked, in the estimate: up to 15 domains


class RegLoRAOptions(StrategyOptions):
    """Defaults are those of the published code on CoIN: LLaVA-1.5 from Vicuna and the pre-trained projector.

    The presets are MCITlib's, named by its release and the benchmark; the ranks of its v3 on MLLM-DCL and UCIT are not
    known to us. It trains the projector in full.
    """

    rank: int = Field(128, ge=1)
    alpha: float = Field(256.0, gt=0.0)
    share: float = Field(0.02, gt=0.0, le=1.0, description="of a layer's entries that each domain marks")
    strength: float = Field(2500.0, ge=0.0)
    overlap: Literal["union", "multiset"] = Field(
        "union", description="entries that several domains marked count once, or as often"
    )


class RegLoRA(Strategy):
    """Stores the branches, and one bit for every entry of every target layer (0.8 GB for LLaVA-1.5-7B)."""

    Options: ClassVar[type[StrategyOptions]] = RegLoRAOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mcitlib-v1-dcl": {"rank": 32, "alpha": 64.0},
        "mcitlib-v1-ucit": {"rank": 16, "alpha": 32.0},
        "mcitlib-v2-acl": {"rank": 32, "alpha": 64.0},
    }
    needs: ClassVar[frozenset[Need]] = frozenset({"parameters"})
    options: RegLoRAOptions

    def __init__(self, options: RegLoRAOptions):
        super().__init__(options)
        self.load_state_dict({})

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate marks and a chunk of a product, and after a domain the largest entries of the widest layer."""
        planes = PLANES if self.options.overlap == "multiset" else 1
        marks = {"marks": planes * sum(d_out * -(-d_in // 8) for d_out, d_in in sizes.layers), "product": CHUNK}
        largest = 4 * self.options.share * max(d_out * d_in for d_out, d_in in sizes.layers)
        gradients = 4 * sizes.numbers  # of the penalty, closed, until its backward pass
        return {"train": {**marks, "penalty": gradients}, "consolidate": {**marks, "largest entries": largest}}

    def before_domain(self, context: Context) -> Branch:
        self._trained = {}
        return fresh_branch(context, self.options)

    def extra_loss(self, context: Context, batch: Mapping[str, Any], outputs: Any, step: Step) -> Tensor | float:
        if not self.options.strength or not self.marks:
            return 0.0
        from mllm_keeplora.linalg import marked_mean

        if not self._trained:
            parameters = context.branches.trainable()
            for layer in context.layers.names:  # whose order no file changes: sums are the same after a stop
                names = (f"base_model.model.{layer}.lora_{part}.domain.weight" for part in "AB")
                self._trained[layer] = tuple(parameters[name] for name in names)
            self.marks = {layer: marks.to(self._trained[layer][0].device) for layer, marks in self.marks.items()}
        total: Tensor | float = 0.0
        for layer, factors in self._trained.items():
            total = total + marked_mean(*factors, self.marks[layer])
        return self.options.strength / len(self._trained) * total

    def after_domain(self, context: Context) -> None:
        """Mark the largest entries of every layer's finished update, and log which share is marked by now."""
        from mllm_keeplora.linalg import count_marks, mark_largest, marked_entries

        trained, device = context.branches.read(), next(context.branches.model.parameters()).device

        def largest(layer: str, factors: tuple[Tensor, Tensor]) -> Tensor:
            A, B = factors
            return mark_largest(A, B, int(self.options.share * len(B) * A.shape[1]))

        def factors_of(layer: str) -> tuple[Tensor, Tensor]:
            return trained.A[layer].to(device), trained.B[layer].to(device)

        for layer, new in context.processes.dealt(factors_of, largest).items():
            marks = self.marks.get(layer)
            earlier = None if marks is None else marks.to(new.device)
            self.marks[layer] = count_marks(earlier, new, self.options.overlap == "multiset")
        entries = sum(len(B) * trained.A[layer].shape[1] for layer, B in trained.B.items())
        context.log({"marked_share": sum(map(marked_entries, self.marks.values())) / entries})

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.marks)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.marks = dict(state)  # layer -> which entries earlier domains marked
        self._trained: dict[str, tuple[Tensor, Tensor]] = {}  # layer -> parameters A and B
