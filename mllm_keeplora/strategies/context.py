"""What a strategy may use, and nothing else: the context of a domain in four parts, and the step of a training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mllm_keeplora.probes.plans import EXACT_FEATURES, EXACT_GRADIENTS, FeaturePlan, GradientPlan

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mllm_keeplora.adapters import Adapters
    from mllm_keeplora.adapters.mixers.mixing import Mixer
    from mllm_keeplora.data.schema import Record
    from mllm_keeplora.linalg import (
        Basis,
        FrequentDirections,
        GradientAccumulator,
        GradientSketch,
        MomentAccumulator,
    )

S, T = TypeVar("S"), TypeVar("T")
Reference = tuple[int, int]  # a training record: place of its domain, its number there


@dataclass(frozen=True)
class DomainInfo:
    """The domain being learnt: its 0-based place in the sequence, its name, and how many the run has so far."""

    index: int
    name: str
    total: int = 1


@dataclass(frozen=True)
class Step:
    """One optimizer step of a training, as one of its micro-batches sees it.

    Attributes:
        number: optimizer steps that were done before.
        records: of the domain in the step, of all processes; fewer where an epoch ends.
        optimizer: of the training.
        tokens: mean number of supervised tokens of the step's micro-batches, a scalar tensor; None before `batch`.
        seed: of the training.
        share: (place, places) of this process's micro-batch among those of all; around a step, of the process.
    """

    number: int
    records: int
    optimizer: torch.optim.Optimizer | None = None
    tokens: Tensor | None = None
    seed: int = 0
    share: tuple[int, int] = (0, 1)

    def drawn(self, population: int, count: int) -> list[int]:
        """Draw numbers below `population` with replacement: this micro-batch's part of `count` for the whole step.

        `batch` and `extra_loss` of a micro-batch get the same part of the same draw; `around_step` gets this process's.
        """
        draws = random.Random(f"{self.seed} {self.number}")
        place, places = self.share
        return [draws.randrange(population) for _ in range(count)][place::places]

    def token_mean(self, values: Tensor) -> Tensor:
        """Mean of an extra loss over supervised tokens, (n,) in this micro-batch: every token of the step counts alike.

        As in the task loss, micro-batches and processes with more tokens weigh more. Divided is by the tokens of the
        training batch, as `batch` left it, whichever tokens the values are of.
        """
        return values.mean() if self.tokens is None else values.sum() / self.tokens


class Layers(Protocol):
    """Target layers by exact module name."""

    names: tuple[str, ...]

    def weight(self, layer: str) -> Tensor:
        """Give the current weight (d_out, d_in), open branch not included."""

    def d_in(self, layer: str) -> int:
        """Give the input size."""

    def depth(self, layer: str) -> int | None:
        """Give the index of the transformer layer; None for the projector's."""

    def groups(self) -> list[list[str]]:
        """Group the layers that receive the same tensor: q, k, v of a block; its gate and up."""


class Data(Protocol):
    """Training records of the domain and, by reference, of earlier ones."""

    records: Sequence[Record]

    def batch_of(self, references: Sequence[Reference]) -> dict[str, Tensor]:
        """Make model inputs of training records."""

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put two batches together as one."""


class Passes(Protocol):
    """Runs of the model over records. `samples` are so many of them, or that share, evenly spaced."""

    def features(
        self,
        samples: int | float,
        plan: FeaturePlan = EXACT_FEATURES,
        of: Sequence[str] = (),
        layers: Sequence[str] | None = None,
    ) -> dict[str, MomentAccumulator | FrequentDirections]:
        """Collect statistics of the target layers' inputs, over records of the domain or of anchor sets named in `of`.

        All processes get the statistics of all records.
        """

    def rounds(self, plan: FeaturePlan) -> list[list[str]] | None:
        """Group target layers for `features`, if exact statistics fit only one group after the other.

        None where `features` takes what the plan wants in one pass. The same in all processes.
        """

    def gradients(
        self, samples: int | float, plan: GradientPlan = EXACT_GRADIENTS
    ) -> dict[str, GradientAccumulator | GradientSketch]:
        """Collect the mean loss gradient of every target layer's weight."""

    def record_gradients(self, samples: int | float) -> Iterator[dict[str, Tensor]]:
        """Give the gradient of -log p(answer) by trained parameter, of one record after the other of this process."""

    def loss_gradients(self, references: Sequence[Reference]) -> dict[str, Tensor]:
        """Give the gradient of training records' mean loss over supervised tokens by trained parameter, dropout off.

        The references are this process's share of the records, which may be none.
        """

    def answer_logits(self, references: Sequence[Reference]) -> Tensor:
        """Give the model's logits now at the answers of training records, (n, classes); at least one record.

        Tokens come in the order of the records, dropout off. With gradient, unless the caller forbids it. A strategy
        that calls it unequally often in its processes needs `forwards`.
        """

    def teacher_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Give logits (n, classes) of the model as it was before this domain, without gradient."""

    def question_features(self, samples: int | float, pictures: bool = True) -> Tensor:
        """Give what frozen parts see in questions, (n, d): this process's share; see `Family.question_features`."""

    def feature_sizes(self, pictures: bool = True) -> tuple[int, int]:
        """Say how many of `question_features` are of words, and how many of pictures."""


class Processes(Protocol):
    """What several processes do together; one process is the identity."""

    def reduce(self, tensors: list[Tensor]) -> None:
        """Sum tensors over processes, in place."""

    def gathered(self, rows: Tensor) -> Tensor:
        """Put the rows of all processes, each of which has its share of the records, into the order of the records."""

    def dealt(
        self, load: Callable[[str], S], work: Callable[[str, S], T], layers: Iterable[str] | None = None
    ) -> dict[str, T]:
        """Do a piece of work (a decomposition) for every target layer, or some, each in one process; all get all.

        `load` gives what is worked on, and is called by all; `work` gives tensors and plain values, nested or not.
        """


class Context(Protocol):
    """One domain as a strategy sees it.

    Attributes:
        branches: the adapters of the base.
        kept: kept basis of every target layer.
        rng: generator seeded from seed, domain and stage.
    """

    layers: Layers
    data: Data
    passes: Passes
    processes: Processes
    branches: Adapters
    kept: dict[str, Basis]
    domain: DomainInfo
    rng: torch.Generator

    def forget(self, layer: str, columns: Sequence[int]) -> None:
        """Give up columns of a layer's kept basis. The only way to do so: what earlier domains kept is on disk."""

    def answer_with(self, mixer: Mixer) -> None:
        """Let a mixer weigh the branches when questions are answered after this domain."""

    def edit_parameter(self, name: str, edit: Callable[[Tensor], Tensor]) -> None:
        """Change a trained parameter outside the optimizer, its float32 master copy included."""

    def log(self, facts: dict[str, Any]) -> None:
        """Enter facts in the run's records: those of a domain in its gradient.json, those of `prepare` in run.json.

        The main process's count, and of one key the last.
        """
