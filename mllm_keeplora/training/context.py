"""The context that strategies work through, carried out on a loaded base: `strategies.context` says what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mllm_keeplora.data.schema import Record
from mllm_keeplora.models.partition import assign, copy_of
from mllm_keeplora.strategies import DomainInfo
from mllm_keeplora.strategies.context import Reference
from mllm_keeplora.system import dealing, distributed
from mllm_keeplora.training.context_passes import RunPasses
from mllm_keeplora.training.passes import Sources

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mllm_keeplora.adapters import Adapters
    from mllm_keeplora.adapters.mixers.mixing import Mixer
    from mllm_keeplora.linalg import Basis
    from mllm_keeplora.models import Base

S, T = TypeVar("S"), TypeVar("T")


class RunContext:
    """One domain as a strategy sees it.

    Args:
        base: the loaded base model.
        branches: its adapters.
        kept: kept basis of every target layer, shared over the domains.
        domain: place and name; index -1 before the first domain.
        records: training records of the domain.
        collate: turns records into a training batch.
        rng: generator seeded from seed, domain and stage.
        probe_batch_size: records per forward of a data pass.
        sources: gives the records of anchor sets and of earlier domains.
        seed: of the stage, for draws that depend on the step alone.
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
    ):
        self.base, self.branches, self.kept = base, branches, kept
        self.domain, self.rng, self.seed = domain, rng, seed
        self.data = RunData(base, domain, records, collate, sources or Sources())
        self.passes = RunPasses(base, branches, domain, self.data, probe_batch_size)
        self.layers = RunLayers(base, branches, self.passes)
        self.processes = RunProcesses(self.layers)
        self.answering: Mixer | None = None
        self.facts: dict[str, Any] = {}
        self.forgotten: dict[str, list[int]] = {}

    def forget(self, layer: str, columns: Sequence[int]) -> None:
        if layer in self.forgotten:
            raise RuntimeError(f"columns of {layer} were forgotten already in this stage")
        self.kept[layer].forget(columns)
        self.forgotten[layer] = sorted(columns)

    def answer_with(self, mixer: Mixer) -> None:
        self.answering = mixer

    def edit_parameter(self, name: str, edit: Callable[[Tensor], Tensor]) -> None:
        import torch

        parameter = self.branches.trainable()[name]
        with torch.no_grad():
            edited = edit(copy_of(parameter))
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
                from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

                safe_set_full_fp32_param(parameter, edit(safe_get_full_fp32_param(parameter)))
            assign(parameter, edited)

    def log(self, facts: dict[str, Any]) -> None:
        self.facts.update(facts)


class RunLayers:
    """Target layers of a loaded base."""

    def __init__(self, base: Base, branches: Adapters, passes: RunPasses):
        self.base, self.branches, self.passes = base, branches, passes
        self.names = branches.layers

    def weight(self, layer: str) -> Tensor:
        return self.branches.weight(layer)

    def d_in(self, layer: str) -> int:
        return self.branches.base.get_submodule(layer).in_features

    def depth(self, layer: str) -> int | None:
        return self.base.parts.depth(layer)

    def groups(self) -> list[list[str]]:
        return self.passes.groups()


class RunData:
    """Training records of a domain and, by reference, of earlier ones."""

    def __init__(
        self,
        base: Base,
        domain: DomainInfo,
        records: Sequence[Record],
        collate: Callable[[Sequence[Record]], dict[str, Tensor]],
        sources: Sources,
    ):
        self.base, self.domain, self.records, self.collate, self.sources = base, domain, records, collate, sources

    def of_domain(self, index: int) -> Sequence[Record]:
        """Training records of a domain that is or was learnt, by its place."""
        return self.records if index == self.domain.index else self.sources.domain(index)

    def batch_of(self, references: Sequence[Reference]) -> dict[str, Tensor]:
        return self.inputs([self.of_domain(domain)[index] for domain, index in references])

    def inputs(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """A training batch of records, on the model's device."""
        device = next(self.base.model.parameters()).device
        return {key: value.to(device) for key, value in self.collate(records).items()}

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.base.family.joined(first, second)


class RunProcesses:
    """The processes of a run."""

    def __init__(self, layers: RunLayers):
        self.layers = layers

    def reduce(self, tensors: list[Tensor]) -> None:
        distributed.all_reduce(tensors)

    def gathered(self, rows: Tensor) -> Tensor:
        return distributed.interleaved(rows)

    def dealt(
        self, load: Callable[[str], S], work: Callable[[str, S], T], layers: Iterable[str] | None = None
    ) -> dict[str, T]:
        chosen = self.layers.names if layers is None else layers
        costs = {layer: float(self.layers.d_in(layer)) ** 3 for layer in chosen}  # of a decomposition
        return dealing.divided(costs, load, work)
