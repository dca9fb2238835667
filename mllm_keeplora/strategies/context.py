"""What a strategy may use, and nothing else: the context of a domain in four parts, and the step of a training."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mllm_keeplora.adapters.factors import Replacement
from mllm_keeplora.data.schema import Record
from mllm_keeplora.models.partition import assign, copy_of
from mllm_keeplora.strategies.passes import Data, DomainInfo, Passes, Sources
from mllm_keeplora.system import dealing, distributed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mllm_keeplora.adapters import Adapters, Factors
    from mllm_keeplora.adapters.mixers.mixing import Mixer
    from mllm_keeplora.linalg import Basis
    from mllm_keeplora.models import Base

S, T = TypeVar("S"), TypeVar("T")


@dataclass(frozen=True)
class Step:
    """A step tells a micro-batch of a training which optimizer step it belongs to.

    Attributes:
        number: optimizer steps that were done before.
        records: of the domain in the step, of all processes; fewer where an epoch ends.
        optimizer, seed: of the training.
        tokens: mean number of supervised tokens of the step's micro-batches, a scalar tensor; None before `batch`.
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
        """Average an extra loss over supervised tokens, (n,) in this micro-batch: every token of the step counts alike.

        As in the task loss, micro-batches with more tokens weigh more: the sum is divided by the tokens of the training
        batch, as `batch` left it, whichever tokens the values are of.
        """
        return values.mean() if self.tokens is None else values.sum() / self.tokens


class Context:
    """A context is a domain as a strategy sees it: layers, data, passes over it, and the processes of the run.

    Args:
        base, branches: the loaded base model and its adapters.
        kept: kept basis of every target layer, shared over the domains.
        domain: place and name; index -1 before the first domain.
        records: training records of the domain.
        collate: turns records into a training batch.
        rng: generator seeded from seed, domain and stage.
        probe_batch_size: records per forward of a data pass.
        sources: gives the records of anchor sets and of earlier domains.
        seed: of the stage, for draws that depend on the step alone.
        trained: reads what a domain trained, by its place.
    """

    def __init__(
        self,
        base: Base,
        branches: Adapters,
        kept: dict[str, Basis],
        domain: DomainInfo,
        records: Sequence[Record],
        collate: Callable[[Sequence[Record]], dict[str, Tensor]],
        rng: torch.Generator,
        probe_batch_size: int,
        sources: Sources | None = None,
        seed: int = 0,
        trained: Callable[[int], tuple[Factors, dict[str, Tensor]]] | None = None,
    ):
        self.base, self.branches, self.kept = base, branches, kept
        self.domain, self.rng, self.seed = domain, rng, seed
        self.data = Data(base, domain, records, collate, sources or Sources())
        self.passes = Passes(base, branches, domain, self.data, probe_batch_size)
        self.layers = Layers(base, branches, self.passes)
        self.processes = Processes(self.layers)
        self.answering: Mixer | None = None
        self.replacement: Replacement | None = None
        self._trained = trained
        self.facts: dict[str, Any] = {}
        self.forgotten: dict[str, list[int]] = {}

    def forget(self, layer: str, columns: Sequence[int]) -> None:
        """Give up columns of a layer's kept basis. The only way to do so: what earlier domains kept is on disk."""
        if layer in self.forgotten:
            raise RuntimeError(f"columns of {layer} were forgotten already in this stage")
        self.kept[layer].forget(columns)
        self.forgotten[layer] = sorted(columns)

    def answer_with(self, mixer: Mixer) -> None:
        """Let a mixer weigh the branches when questions are answered after this domain."""
        self.answering = mixer

    def answer_as(
        self, factors: Factors, instead_of: Literal["unit", "all"] = "unit", full: dict[str, Tensor] | None = None
    ) -> None:
        """Let a branch answer from now on in the place of the one that this domain trained; for `after_domain`.

        The next domain starts from it, too. The trained one stays in the run (`trained`).

        Args:
            factors: (A (r, d_in), B (d_out, r), alpha) of layers, whatever their ranks; others answer as the base does.
            instead_of: `unit`, of this domain's branch alone; `all`, also of those of all earlier domains, for a
                strategy whose `combine` is `merge`.
            full: deltas of parameters trained in full, in the place of as many; None leaves the trained ones.

        Raises:
            ValueError: a layer that is no target, or whose size is another; a parameter that was not trained in full.
        """
        for layer, A in factors.A.items():
            if layer not in self.layers.names:
                raise ValueError(f"{layer} is no target layer")
            sizes, wanted = (len(factors.B[layer]), A.shape[1]), (self.layers.d_out(layer), self.layers.d_in(layer))
            if sizes != wanted:
                raise ValueError(f"the branch to answer has (d_out, d_in) {sizes} in {layer}, which has {wanted}")
        if full is not None and set(full) != set(self.branches.full):
            raise ValueError(f"parameters trained in full are {sorted(self.branches.full)}, got {sorted(full)}")
        self.replacement = Replacement(factors, instead_of, full)

    def trained(self, index: int) -> tuple[Factors, dict[str, Tensor]]:
        """Give what a domain's training left, by its place: its branch, and deltas of parameters trained in full.

        Of earlier domains those that the strategy `recalls`; of this one in `after_domain`. Files are read each time.
        """
        return self._trained(index)

    def edit_parameter(self, name: str, edit: Callable[[Tensor], Tensor]) -> None:
        """Change a trained parameter outside the optimizer, its float32 master copy included."""
        import torch

        parameter = self.branches.trainable()[name]
        with torch.no_grad():
            edited = edit(copy_of(parameter))
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
                from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

                safe_set_full_fp32_param(parameter, edit(safe_get_full_fp32_param(parameter)))
            assign(parameter, edited)

    def log(self, facts: dict[str, Any]) -> None:
        """Enter facts in the run's records: those of a domain in its gradient.json, those of `prepare` in run.json.

        The main process's facts count, and the last of a key.
        """
        self.facts.update(facts)


class Layers:
    """These layers are the targets, by exact module name."""

    def __init__(self, base: Base, branches: Adapters, passes: Passes):
        self.base, self.branches, self.passes = base, branches, passes
        self.names = branches.layers

    def weight(self, layer: str) -> Tensor:
        """Give the current weight (d_out, d_in), open branch not included."""
        return self.branches.weight(layer)

    def d_in(self, layer: str) -> int:
        """Give the input size."""
        return self.branches.base.get_submodule(layer).in_features

    def d_out(self, layer: str) -> int:
        """Give the output size."""
        return self.branches.base.get_submodule(layer).out_features

    def tower(self, layer: str) -> str | None:
        """Give the name of the tower: `language`, or `vision` and `text` of a dual base; None for a projector's."""
        return self.base.parts.tower(layer)

    def depth(self, layer: str) -> int | None:
        """Give the index of the transformer layer; None for the projector's."""
        return self.base.parts.depth(layer)

    def groups(self) -> list[list[str]]:
        """Group the layers that receive the same tensor: q, k, v of a block; its gate and up."""
        return self.passes.groups()


class Processes:
    """Processes do these things together; one process is the identity."""

    def __init__(self, layers: Layers):
        self.layers = layers

    def reduce(self, tensors: list[Tensor]) -> None:
        """Sum tensors over processes, in place."""
        distributed.all_reduce(tensors)

    def gathered(self, rows: Tensor) -> Tensor:
        """Put the rows of all processes, each with its share of the records, into the order of the records."""
        return distributed.interleaved(rows)

    def dealt(
        self, load: Callable[[str], S], work: Callable[[str, S], T], layers: Iterable[str] | None = None
    ) -> dict[str, T]:
        """Do a piece of work (a decomposition) for every target layer, or some, each in one process; all get all.

        `load` gives what is worked on, and is called by all; `work` gives tensors and plain values, nested or not.
        """
        chosen = self.layers.names if layers is None else layers
        costs = {layer: float(self.layers.d_in(layer)) ** 3 for layer in chosen}  # of a decomposition
        return dealing.dealt(costs, load, work)
