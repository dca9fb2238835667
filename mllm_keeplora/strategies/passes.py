"""Records of a domain and runs of the model over them, as strategies ask for them: features, gradients, answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from mllm_keeplora.data.collate import batches, evenly_spaced, spaced_between_ends
from mllm_keeplora.data.schema import Record
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.models.partition import IdleBatch, is_partitioned, streamed
from mllm_keeplora.models.running import as_in_training, evaluating
from mllm_keeplora.probes.features import collect_moments, shared_inputs
from mllm_keeplora.probes.gradients import collect_mean_gradients
from mllm_keeplora.probes.plans import EXACT_FEATURES, EXACT_GRADIENTS, FeaturePlan, GradientPlan
from mllm_keeplora.probes.questions import carrying, question_means
from mllm_keeplora.system import distributed, watch
from mllm_keeplora.system.progress import progress_bar

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters import Adapters
    from mllm_keeplora.adapters.prototypes import ClassMeans
    from mllm_keeplora.models import Base
    from mllm_keeplora.probes.plans import Features, Gradients, Spacing

Reference = tuple[int, int]  # a training record: place of its domain, its number there


@dataclass(frozen=True)
class DomainInfo:
    """Name what is being learnt: a domain, or `joint`.

    Attributes:
        index: place in the sequence from 0 (units count from 1); -1 before the first.
        total: how many the run has so far.
    """

    index: int
    name: str
    total: int = 1


@dataclass
class Sources:
    """Sources give records that the domain itself does not have."""

    anchors: Callable[[str], Sequence[Record]] | None = None  # records of an anchor set by its name
    trained: Callable[[str], Sequence[Record]] | None = None  # training records of a domain by its name
    names: Sequence[str] = ()  # of the units of the sequence, in order
    read: dict[int, Sequence[Record]] = field(default_factory=dict)  # else a file is read again for every record

    def domain(self, index: int) -> Sequence[Record]:
        """Give the training records of a domain by its place."""
        if index not in self.read:
            self.read[index] = self.trained(self.names[index])
        return self.read[index]


@dataclass
class Data:
    """Give training records of a domain and, by reference, of earlier ones."""

    base: Base
    domain: DomainInfo
    records: Sequence[Record]
    collate: Callable[[Sequence[Record]], dict[str, Tensor]]
    sources: Sources

    def of_domain(self, index: int) -> Sequence[Record]:
        """Give the training records of a domain that is or was learnt, by its place."""
        return self.records if index == self.domain.index else self.sources.domain(index)

    def batch_of(self, references: Sequence[Reference]) -> dict[str, Tensor]:
        """Make model inputs of training records by reference."""
        return self.inputs([self.of_domain(domain)[index] for domain, index in references])

    def inputs(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """Make a training batch of records, on the model's device."""
        return self.placed(self.collate(records))

    def placed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put a batch on the model's device."""
        device = next(self.base.model.parameters()).device
        return {key: value.to(device) for key, value in batch.items()}

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put two batches together as one."""
        return self.base.family.joined(first, second)


def own_batches(
    model: Any, collate: Callable[[Sequence[Record]], dict], records: Sequence[Record], size: int
) -> Iterator[dict]:
    """Make model inputs of this process's share of the records.

    Where weights are divided (ZeRO-3) all processes run equally many batches: those with fewer end with idle ones.
    """
    from mllm_keeplora.adapters.mixers.mixing import look_at

    device, rank, world = next(model.parameters()).device, distributed.rank(), distributed.world_size()
    own = records[rank::world]
    idle = math.ceil(len(records[::world]) / size) - math.ceil(len(own) / size) if is_partitioned(model) else 0
    for kind, part in chain(((dict, part) for part in batches(own, size)), [(IdleBatch, records[:1])] * idle):
        batch = kind({key: value.to(device) for key, value in collate(part).items()})
        look_at(model, batch)
        yield batch
        watch.stop_here()


@dataclass
class Passes:
    """Run the model over records, of which each process has its share.

    `samples` are so many records of the domain, or that share of them, evenly spaced.
    """

    base: Base
    branches: Adapters
    domain: DomainInfo  # for what the user is told
    data: Data
    batch_size: int  # records per forward

    def features(
        self,
        samples: int | float,
        plan: FeaturePlan = EXACT_FEATURES,
        of: Sequence[str] = (),
        layers: Sequence[str] | None = None,
    ) -> Features:
        """Collect statistics of the target layers' inputs, over records of the domain or of anchor sets named in `of`.

        All processes get the statistics of all records.
        """
        records = self.data.records
        if of:  # answers of anchors are not used: the first question of each, whose tokens see no answer
            records = [record.first_exchange() for name in of for record in self.data.sources.anchors(name)]
            plan = replace(plan, tokens={**(plan.tokens or {}), "answer": 0})
        chosen = _chosen(records, samples, plan.spacing)
        passed, idle = self._pass(chosen, "anchors" if of else "features"), self._idle_layers(chosen)
        return collect_moments(self.base.family, self.branches.model, self._modules(layers), passed, plan, idle)

    def rounds(self, plan: FeaturePlan) -> list[list[str]] | None:
        """Group target layers for `features`, if exact statistics fit only one group after the other.

        None where `features` takes what the plan wants in one pass. The same in all processes.
        """
        if plan.statistic != "auto":
            return None
        modules = self._modules()
        widths = {name: layer.in_features for name, layer in modules.items()}
        device = next(iter(modules.values())).weight.device
        return distributed.from_main(plan.exact_passes(self.groups(), widths, device))  # by its memory

    def gradients(self, samples: int | float, plan: GradientPlan = EXACT_GRADIENTS) -> Gradients:
        """Collect the mean loss gradient of every target layer's weight."""
        chosen = _chosen(self.data.records, samples, plan.spacing)
        passed, idle = self._pass(chosen, "gradient"), self._idle_layers(chosen)
        return collect_mean_gradients(self.base.family, self.branches.model, self._modules(), passed, plan, idle)

    def record_gradients(self, samples: int | float) -> Iterator[dict[str, Tensor]]:
        """Give the gradient of -log p(answer) by trained parameter, of one record after the other of this process."""
        for batch in self._pass(_chosen(self.data.records, samples), "gradients", 1):
            yield self._gradients(batch)[0]

    def batch_gradients(self, samples: int | float, size: int) -> Iterator[dict[str, Tensor]]:
        """Give the gradient of a batch's mean loss over answer tokens by trained parameter, of `size` records each."""
        for batch in self._pass(_chosen(self.data.records, samples), "gradients", size):
            found, tokens = self._gradients(batch)
            yield {name: gradient / tokens for name, gradient in found.items()}

    def loss_gradients(self, references: Sequence[Reference]) -> dict[str, Tensor]:
        """Give the gradient of training records' mean loss over supervised tokens by trained parameter, dropout off.

        The references are this process's share of the records, which may be none.
        """
        return self.mean_gradients(map(self.data.batch_of, batches(references, self.batch_size)))[0]

    def mean_gradients(self, collated: Iterable[Mapping[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
        """Give the gradient of batches' mean loss over supervised tokens by trained parameter, and how many these are.

        Dropout is off. The batches, on the model's device, are this process's share, which may be none.
        """
        import torch

        sums = {name: torch.zeros_like(parameter) for name, parameter in self.branches.trainable().items()}
        count = torch.zeros(1, device=next(iter(sums.values())).device)
        for batch in collated:
            found, tokens = self._gradients(batch)
            sums = {name: total + found[name] for name, total in sums.items()}
            count += tokens
        distributed.all_reduce([*sums.values(), count])
        return {name: each / count for name, each in sums.items()}, count

    def answer_logits(self, references: Sequence[Reference]) -> Tensor:
        """Give the model's logits now at the answers of training records, (n, classes); at least one record.

        Tokens come in the order of the records, dropout off. With gradient, unless the caller forbids it. A strategy
        that calls it unequally often in its processes needs `forwards`.
        """
        trains = self.branches.model.training
        assert not (trains and self.branches.mixer), "live branches are weighed for one batch at a time in a training"
        with evaluating(self.branches.model):
            return self._logits(self.data.batch_of(references))

    def teacher_logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Give logits (n, classes) of the model as it was before this domain, without gradient."""
        import torch

        supervised = self.base.family.supervised(self.branches.base, batch)
        with torch.no_grad(), self.branches.closed(), supervised:
            return self.branches.model(**inputs_of(batch)).logits[0]

    def class_means(self) -> ClassMeans:
        """Average what a dual encoder sees in the domain's pictures by their class, over all processes."""
        import torch

        from mllm_keeplora.adapters.prototypes import ClassMeans

        means, classes = None, len(self.data.records[0].classes.names)
        with torch.no_grad(), evaluating(self.branches.model), streamed(self.branches.base):
            for batch in self._pass(self.data.records, "pictures"):
                features = self.base.family.picture_features(self.branches.model, batch)
                means = means or ClassMeans(classes, features.shape[1], features.device)
                if not isinstance(batch, IdleBatch):
                    means.update(features, batch["labels"])
        width = max(distributed.gather(0 if means is None else means.sums.shape[1]))
        means = means or ClassMeans(classes, width, next(self.base.model.parameters()).device)
        distributed.all_reduce([means.sums, means.counts])
        return means

    def question_features(self, samples: int | float, pictures: bool = True) -> Tensor:
        """Give what frozen parts see in questions, (n, d): this process's share; see `Family.question_features`."""
        return self._of_questions(samples, pictures, self.base.family.question_features)

    def question_states(self, samples: int | float, pictures: bool = True) -> Tensor:
        """Give the states that the model before this domain ends questions with, (n, d): this process's share."""
        with self.branches.closed():
            return self._of_questions(samples, pictures, self.base.family.question_states)

    def question_inputs(self, batch: Mapping[str, Tensor], frozen: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        """Give what every target layer receives of each question of a training batch, as `question_means` does.

        With `frozen`, what frozen parts see in it, in the place of any layer's inputs.
        """
        import torch

        family, base, layers = self.base.family, self.branches.base, self.branches.layers
        if frozen:
            with torch.no_grad(), streamed(base):
                return dict.fromkeys(layers, (family.question_features(base, batch), carrying(batch["labels"])))
        self.branches.look_at(batch)
        return question_means(family, base, layers, self.base.parts.projectors, batch)

    def feature_sizes(self, pictures: bool = True) -> tuple[int, int]:
        """Say how many of `question_features` are of words, and how many of pictures."""
        return self.base.family.feature_sizes(self.branches.base, pictures)

    def groups(self) -> list[list[str]]:
        """Group target layers that receive the same tensor; those that no text reaches are each for itself."""
        groups = self._reached_by_text()
        reached = {layer for group in groups for layer in group}
        return groups + [[layer] for layer in self.branches.layers if layer not in reached]

    # -- parts of the above --------------------------------------------------------------------------------------

    def _modules(self, layers: Sequence[str] | None = None) -> dict[str, Any]:
        chosen = self.branches.layers if layers is None else layers
        return {layer: self.branches.base.get_submodule(layer) for layer in chosen}

    def _reached_by_text(self) -> list[list[str]]:
        """Target layers that are reached where no record has a picture, grouped by their input."""
        batch = self.data.placed(self.base.family.example())
        self.branches.look_at(batch)
        return shared_inputs(self.base.family, self.branches.model, self._modules(), batch)

    def _idle_layers(self, records: Sequence[Record]) -> list[str]:
        """Target layers, such as a projector's, that a pass does not reach as none of its records has a picture."""
        if any(record.media for record in records):
            return []
        reached = {layer for group in self._reached_by_text() for layer in group}
        return [layer for layer in self.branches.layers if layer not in reached]

    def _pass(self, records: Sequence[Record], title: str, size: int | None = None) -> Iterator[dict]:
        """Model inputs over records, of which each process takes its share."""
        with progress_bar(f"{self.domain.name}: {title}", len(records) // distributed.world_size()) as advance:
            for batch in own_batches(self.branches.base, self.data.collate, records, size or self.batch_size):
                yield batch
                advance(0 if isinstance(batch, IdleBatch) else len(batch["labels"]))

    def _of_questions(self, samples: int | float, pictures: bool, seen: Callable[..., Tensor]) -> Tensor:
        import torch

        found, base = [], self.branches.base
        with torch.no_grad(), streamed(base):
            for batch in self._pass(_chosen(self.data.records, samples), "questions"):
                features = seen(base, batch, pictures).cpu()
                found += [] if isinstance(batch, IdleBatch) else [features]
        return torch.cat(found) if found else torch.zeros(0, sum(self.feature_sizes(pictures)))

    def _gradients(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Gradient of the summed loss over supervised tokens by trained parameter, and how many tokens they are."""
        import torch

        trained = self.branches.trainable()
        with evaluating(self.branches.model, checkpointing=True):  # the backward pass runs blocks again
            with as_in_training(self.branches.base):
                losses, _ = self.base.family.losses(self._logits(batch)[None], batch["labels"])
            found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        pairs = zip(trained.items(), found, strict=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}, losses.numel()

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        self.branches.look_at(batch)
        with self.base.family.supervised(self.branches.base, batch):
            return self.branches.model(**inputs_of(batch)).logits[0]


def _chosen(records: Sequence[Record], samples: int | float, spacing: Spacing = "even") -> Sequence[Record]:
    is_share = samples < 1 or (samples == 1 and isinstance(samples, float))
    if spacing == "ends":  # the count is cut, not rounded
        count = max(1, int(samples * len(records))) if is_share else min(int(samples), len(records))
        return spaced_between_ends(records, count)
    return evenly_spaced(records, max(1, round(samples * len(records))) if is_share else int(samples))
