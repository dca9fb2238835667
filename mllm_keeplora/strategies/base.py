"""The contract of a strategy: what to learn and what to keep. A strategy never sees DeepSpeed, paths or scores.

Only `before_domain` must be defined; every other hook does nothing by default, so a strategy states its differences.
The context is everything it may touch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mllm_keeplora.adapters import Branch
from mllm_keeplora.strategies.context import Context, Step
from mllm_keeplora.strategies.footprint import Footprint, PassSizes
from mllm_keeplora.strategies.passes import DomainInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Branch", "Context", "DomainInfo", "Need", "Samples", "Step", "Strategy", "StrategyOptions"]


def _count_or_share(value: int | float) -> int | float:
    if value > 1 and value != int(value):
        raise ValueError("must be a whole number of records, or a share of them of at most 1.0")
    return value


Samples = Annotated[int | float, Field(gt=0), AfterValidator(_count_or_share)]  # 512 records; 0.2 or 1.0 of them all
Need = Literal["gradients", "parameters", "forwards"]


class StrategyOptions(BaseModel):
    """These options every strategy has; its own model extends them. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0.0)

    @property
    def record_sets(self) -> tuple[str, ...]:
        """The names of further record sets that the strategy reads (`Passes.features`), checked before a run."""
        return ()

    def refuse_unfit(self, sizes: Mapping[str, tuple[int, int]], towers: Mapping[str, str | None]) -> None:
        """Raise a UserError for each option that the base's target layers do not allow.

        Args:
            sizes: (d_out, d_in) of every target layer.
            towers: what each belongs to, as `Layers.tower` says.
        """

    @property
    def every_class(self) -> bool:
        """Whether each class of a domain's list needs a training record."""
        return False


class Strategy:
    """A strategy derives from this class. `stream` and the other declarations tell the sequence how to drive it.

    A run may be killed and continued anywhere, by a new object, so attributes are lost between hooks. What survives:

        prepare                           `context.kept`, and what it logs
        before_domain                     the branch that it returns, and what it logs
        batch, extra_loss, around_step    what `training_state` gives, until `after_domain`
        after_domain                      `context.kept`, and what `state_dict` gives
    """

    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    # Options by the name of a preset; what a run's config says goes on top.
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    # One domain after another, all of them at once (joint training), or nothing at all.
    stream: ClassVar[Literal["sequential", "union", "none"]] = "sequential"
    # Whether a domain's training starts at the model after the domain before, or at the untouched base.
    start_from: ClassVar[Literal["previous", "base"]] = "previous"
    # How branches answer: merged into the weights, summed with magnitudes, weighed by gates, routed to one, or told.
    combine: ClassVar[Literal["merge", "sum", "gate", "route", "oracle"]] = "merge"
    # Which earlier domains' branches its hooks read as they were trained (`Context.trained`), beside what answers.
    recalls: ClassVar[Literal["none", "last", "all"]] = "none"
    # Whether a question can be answered only if its domain is told (`oracle`).
    needs_domain_id: ClassVar[bool] = False
    # Whether a batch may hold records of several domains.
    joins_domains: ClassVar[bool] = False

    def __init__(self, options: StrategyOptions):
        self.options = options

    @property
    def needs(self) -> frozenset[Need]:
        """The needs that some DeepSpeed settings take away; such a run is refused.

        A plain class attribute will do. `gradients`: whole ones between backward and step (no DeepSpeed at all).
        `parameters`: whole trained ones outside of the model's forward (no ZeRO-3). `forwards`: of its own, more in
        one process than in another (no ZeRO-3).
        """
        return frozenset()

    @property
    def trains(self) -> tuple[str, ...]:
        """The factors of a branch that train; of A and B, and of a mixer its own."""
        return ("A", "B")

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate what the hooks take beside base, branch and past: stage -> what -> bytes on a device.

        Stages are `prepare`, `gradient` (before_domain), `train`, `consolidate` (after_domain), and `always`. What is
        named in `train` stands in place of what a plain training takes by that name.
        """
        return {}

    def prepare(self, context: Context) -> None:
        """Prepare once, before the first domain, with the untouched base; `context.domain` has index -1."""

    def before_domain(self, context: Context) -> Branch | None:
        """Begin the branch that this domain trains, possibly after a pass over its data; the stage opens it.

        Deprecated, until the next release: open it by `context.branches.open`, and return None.
        """
        return None

    def batch(self, context: Context, batch: dict[str, Any], step: Step) -> dict[str, Any]:
        """Change a training batch (replay), before its answers' tokens are counted."""
        return batch

    def extra_loss(self, context: Context, batch: Mapping[str, Any], outputs: Any, step: Step) -> Tensor | float:
        """Give a term that is added to the task loss.

        Args:
            context: of the domain.
            batch: model inputs with labels.
            outputs: the model's; `logits` (1, n, classes) are of what carries loss alone, as under `Family.supervised`.
            step: of the training.
        """
        return 0.0

    def around_step(self, context: Context, phase: Literal["grad", "post"], step: Step) -> None:
        """Act before clipping and the optimizer's step (`grad`), and after it (`post`).

        Gradients are those of task loss and extra loss together, over all processes and micro-batches.
        """

    def after_domain(self, context: Context) -> None:
        """Gather statistics and grow what is kept, with the finished branch active and not yet merged."""

    def training_state(self) -> dict[str, Tensor]:
        """Give what a training adds up beside its parameters (a path integral, a running mean).

        It goes into every checkpoint, and to `after_domain`. The main process alone is asked.
        """
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `training_state` gave, on the CPU, before a training's first step; empty at its start.

        Also before `after_domain`, where that runs in another process than the training did.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Give what must survive to the next domain beyond branches and kept bases."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
