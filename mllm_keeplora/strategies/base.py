"""The contract of a strategy: what to learn and what to keep. A strategy never sees DeepSpeed, paths or scores.

Every hook is a no-op by default, so a strategy states only its differences. The context is everything it may touch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mllm_keeplora.probes.plans import EXACT_FEATURES, EXACT_GRADIENTS, FeaturePlan, GradientPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mllm_keeplora.adapters import Adapters
    from mllm_keeplora.adapters.mixers.mixing import Mixer
    from mllm_keeplora.linalg import (
        Basis,
        FrequentDirections,
        GradientAccumulator,
        GradientSketch,
        MomentAccumulator,
    )

S, T = TypeVar("S"), TypeVar("T")


def _count_or_share(value: int | float) -> int | float:
    if value > 1 and value != int(value):
        raise ValueError("must be a whole number of records, or a share of them of at most 1.0")
    return value


Samples = Annotated[int | float, Field(gt=0), AfterValidator(_count_or_share)]  # 512 records; 0.2 or 1.0 of them all
Need = Literal["gradients", "parameters", "forwards"]


class StrategyOptions(BaseModel):
    """Options that every strategy has; a strategy's own model extends it. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0.0)

    @property
    def record_sets(self) -> tuple[str, ...]:
        """Names of further record sets that the strategy reads (`Context.collect_inputs`), checked before a run."""
        return ()


@dataclass(frozen=True)
class DomainInfo:
    """The domain being learnt: its 0-based place in the sequence, its name, and how many the run has so far."""

    index: int
    name: str
    total: int = 1


class Context(Protocol):
    """What a strategy may use, and nothing else."""

    branches: Adapters
    target_layers: tuple[str, ...]
    domain: DomainInfo
    kept: dict[str, Basis]
    optimizer: torch.optim.Optimizer | None
    step: int
    rng: torch.Generator

    def weight(self, layer: str) -> Tensor:
        """Current weight (d_out, d_in) of a target layer, open branch not included."""

    def d_in(self, layer: str) -> int:
        """Input size of a target layer."""

    def depth(self, layer: str) -> int | None:
        """Index of the transformer layer; None for the projector's."""

    def shared_inputs(self) -> list[list[str]]:
        """Target layers in groups that receive the same tensor: q, k, v of a block; its gate and up."""

    def collect_inputs(
        self,
        samples: int | float,
        plan: FeaturePlan = EXACT_FEATURES,
        of: Sequence[str] = (),
        layers: Sequence[str] | None = None,
    ) -> dict[str, MomentAccumulator | FrequentDirections]:
        """Feature statistics of the target layers' inputs, over so many (or that share of) evenly spaced records.

        The records are those of the domain, or of the anchor sets named in `of`.
        """

    def exact_passes(self, plan: FeaturePlan) -> list[list[str]] | None:
        """Target layers in groups for `collect_inputs`, whose exact statistics fit one group after the other.

        None where `collect_inputs` takes what the plan wants in one pass. The same in all processes.
        """

    def collect_weight_gradients(
        self, samples: int | float, plan: GradientPlan = EXACT_GRADIENTS
    ) -> dict[str, GradientAccumulator | GradientSketch]:
        """Mean loss gradient of every target layer, over so many (or that share of) evenly spaced records."""

    def forget(self, layer: str, columns: Sequence[int]) -> None:
        """Give up columns of a layer's kept basis. The only way to do so: what earlier domains kept is on disk."""

    def teacher_forward(self, batch: Mapping[str, Any]) -> Any:
        """Outputs of the model as it was before this domain, without gradient; logits as in `extra_loss`."""

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean of an extra loss over answer tokens, (n,) in this micro-batch: every token of the step counts alike.

        As in the task loss, micro-batches and processes with more tokens weigh more. Divided is by the answer tokens of
        the training batch, as `batch` left it, whichever tokens the values are of.
        """

    @property
    def num_records(self) -> int:
        """Training records of this domain."""

    @property
    def batch_size(self) -> int:
        """Records of the domain in this optimizer step, of all processes; fewer where an epoch ends."""

    def drawn(self, population: int, count: int) -> list[int]:
        """Numbers below `population`, drawn with replacement for this optimizer step: this micro-batch's part.

        `count` are drawn for the whole step, whatever its processes and micro-batches. `batch` and `extra_loss` of a
        micro-batch get the same part of the same draw; `around_step` gets this process's part.
        """

    def batch_of(self, references: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Model inputs of training records by reference: (place of the domain, number of the record)."""

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Two batches as one."""

    def answer_logits(self, references: Sequence[tuple[int, int]]) -> Tensor:
        """Logits of the model as it is now at the answers of training records, (n, vocabulary); at least one record.

        References as in `batch_of`; tokens in the order of the records, dropout off. With gradient, unless the caller
        forbids it. A strategy that calls it unequally often in its processes needs `forwards`.
        """

    def loss_gradients(self, references: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Gradient of training records' mean loss over answer tokens by trained parameter, dropout off.

        References as in `batch_of`: this process's share of the records, which may be none.
        """

    def record_gradients(self, samples: int | float) -> Iterator[dict[str, Tensor]]:
        """Gradient of -log p(answer) by trained parameter, one of so many evenly spaced records after the other.

        Each process has its share of the records.
        """

    def prompt_features(self, samples: int | float, pictures: bool = True) -> Tensor:
        """What frozen parts see in the questions of evenly spaced records, (n, d): this process's share.

        `adapters.features.prompt_features` says what; without `pictures` it is text alone.
        """

    def answer_with(self, mixer: Mixer) -> None:
        """Let a mixer weigh the branches when questions are answered after this domain."""

    def gathered(self, rows: Tensor) -> Tensor:
        """Rows of all processes, each of which has its share of the records, in the order of the records."""

    def reduce(self, tensors: list[Tensor]) -> None:
        """Sum tensors over processes, in place."""

    def divided(
        self, load: Callable[[str], S], work: Callable[[str, S], T], layers: Iterable[str] | None = None
    ) -> dict[str, T]:
        """Do a piece of work (a decomposition) for every target layer, or some of them, each by one process.

        All processes get every result.

        `load` gives what is worked on, and is called by all; `work` gives tensors and plain values, nested or not.
        """

    def edit_parameter(self, name: str, edit: Callable[[Tensor], Tensor]) -> None:
        """Change a trained parameter outside the optimiser, its float32 master copy included."""

    def log(self, facts: dict[str, Any]) -> None:
        """Enter facts in the run's records: those of a domain in its gradient.json, those of `prepare` in run.json.

        The main process's count, and of one key the last.
        """


class Strategy:
    """Base of all strategies. `stream` and the other declarations tell the sequence how to drive it.

    A run may be killed and continued anywhere, by a new object. What a hook leaves in an attribute lasts so far:

        prepare                           no further: kept are `context.kept` and what is logged
        before_domain                     no further: kept is the branch that it opens
        batch, extra_loss, around_step    until `after_domain`, if `training_state` gives it
        after_domain                      until the next domain's, if `state_dict` gives it
    """

    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    stream: ClassVar[Literal["sequential", "union", "none"]] = "sequential"
    start_from: ClassVar[Literal["previous", "base"]] = "previous"
    combine: ClassVar[Literal["merge", "sum", "gate", "route", "oracle"]] = "merge"
    needs_domain_id: ClassVar[bool] = False

    def __init__(self, options: StrategyOptions):
        self.options = options

    @property
    def needs(self) -> frozenset[Need]:
        """What DeepSpeed takes away, and a run with it is refused for.

        `gradients`: whole ones between backward and step (no DeepSpeed at all). `parameters`: whole trained ones
        outside of the model's forward (no ZeRO-3). `forwards`: of its own, more in one process than in another (no
        ZeRO-3).
        """
        return frozenset()

    def prepare(self, context: Context) -> None:
        """Once, before the first domain, with the untouched base; `context.domain` has index -1."""

    def before_domain(self, context: Context) -> None:
        """Open the branch that this domain trains, possibly after a pass over its data."""

    def batch(self, context: Context, batch: dict[str, Any]) -> dict[str, Any]:
        """Change a training batch (replay), before its answers' tokens are counted."""
        return batch

    def extra_loss(self, context: Context, batch: Mapping[str, Any], outputs: Any) -> Tensor | float:
        """A term added to the task loss.

        Args:
            context: of the domain.
            batch: model inputs with labels.
            outputs: the model's; `logits` (1, n, vocabulary) are those of the supervised positions alone, in the order
                of `models.causal.losses.supervised_positions`.
        """
        return 0.0

    def around_step(self, context: Context, phase: Literal["grad", "post"]) -> None:
        """Before clipping and the optimiser's step (`grad`), and after it (`post`).

        Gradients are those of task loss and extra loss together, over all processes and micro-batches.
        """

    def after_domain(self, context: Context) -> None:
        """Statistics and growth, with the finished branch active and not yet merged."""

    def training_state(self) -> dict[str, Tensor]:
        """What a training adds up beside its parameters (a path integral, a running mean).

        It goes into every checkpoint, and to `after_domain`. The main process alone is asked.
        """
        return {}

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Before a training's first step: take back what `training_state` gave, on the CPU; empty at its start.

        Also before `after_domain`, where that runs in another process than the training did.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What must survive to the next domain beyond branches and kept bases."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
