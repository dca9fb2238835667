"""Runs of the model over records, as strategies ask for them: features, gradients, answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mllm_keeplora.data.collate import batches, evenly_spaced
from mllm_keeplora.data.schema import Record, Turn
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.models.partition import IdleBatch, streamed
from mllm_keeplora.models.running import as_in_training, evaluating
from mllm_keeplora.probes.features import collect_moments, exact_passes, shared_inputs
from mllm_keeplora.probes.gradients import collect_mean_gradients
from mllm_keeplora.probes.plans import EXACT_FEATURES, EXACT_GRADIENTS, FeaturePlan, GradientPlan
from mllm_keeplora.strategies.context import DomainInfo, Reference
from mllm_keeplora.system import distributed
from mllm_keeplora.system.progress import progress_bar
from mllm_keeplora.training.passes import own_batches

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters import Adapters
    from mllm_keeplora.linalg import (
        FrequentDirections,
        GradientAccumulator,
        GradientSketch,
        MomentAccumulator,
    )
    from mllm_keeplora.models import Base
    from mllm_keeplora.training.context import RunData


class RunPasses:
    """Passes over a domain's records, of which each process runs its share.

    Args:
        base, branches: the loaded base and its adapters.
        domain: for what the user is told.
        data: gives records and batches.
        batch_size: records per forward.
    """

    def __init__(self, base: Base, branches: Adapters, domain: DomainInfo, data: RunData, batch_size: int):
        self.base, self.branches, self.family = base, branches, base.family
        self.domain, self.data, self.batch_size = domain, data, batch_size

    def features(
        self,
        samples: int | float,
        plan: FeaturePlan = EXACT_FEATURES,
        of: Sequence[str] = (),
        layers: Sequence[str] | None = None,
    ) -> dict[str, MomentAccumulator | FrequentDirections]:
        records = self.data.records
        if of:  # answers of anchors are not used: the first question of each, whose tokens see no answer
            records = [record.first_exchange() for name in of for record in self.data.sources.anchors(name)]
            plan = plan.of_questions()
        passed = self._pass(records, samples, "anchors" if of else "features")
        idle = self._idle_layers(records, samples)
        return collect_moments(self.family, self.branches.model, self._modules(layers), passed, plan, idle)

    def rounds(self, plan: FeaturePlan) -> list[list[str]] | None:
        return exact_passes(self.groups(), self._modules(), plan) if plan.statistic == "auto" else None

    def gradients(
        self, samples: int | float, plan: GradientPlan = EXACT_GRADIENTS
    ) -> dict[str, GradientAccumulator | GradientSketch]:
        passed = self._pass(self.data.records, samples, "gradient")
        idle = self._idle_layers(self.data.records, samples)
        return collect_mean_gradients(self.family, self.branches.model, self._modules(), passed, plan, idle)

    def record_gradients(self, samples: int | float) -> Iterator[dict[str, Tensor]]:
        chosen = _chosen(self.data.records, samples)
        with progress_bar(f"{self.domain.name}: gradients", len(chosen) // distributed.world_size()) as advance:
            for batch in own_batches(self.branches.base, self.data.collate, chosen, 1):
                yield self._gradients(batch)[0]
                advance()

    def loss_gradients(self, references: Sequence[Reference]) -> dict[str, Tensor]:
        import torch

        sums = {name: torch.zeros_like(parameter) for name, parameter in self.branches.trainable().items()}
        count = torch.zeros(1, device=next(iter(sums.values())).device)
        for part in batches(references, self.batch_size):
            found, tokens = self._gradients(self.data.batch_of(part))
            sums = {name: total + found[name] for name, total in sums.items()}
            count += tokens
        distributed.all_reduce([*sums.values(), count])
        return {name: each / count for name, each in sums.items()}

    def answer_logits(self, references: Sequence[Reference]) -> Tensor:
        trains = self.branches.model.training
        assert not (trains and self.branches.mixer), "live branches are weighed for one batch at a time in a training"
        with evaluating(self.branches.model):
            return self._logits(self.data.batch_of(references))

    def teacher_logits(self, batch: Mapping[str, Any]) -> Tensor:
        import torch

        supervised = self.family.supervised(self.branches.base, batch["labels"])
        with torch.no_grad(), self.branches.closed(), supervised:
            return self.branches.model(**inputs_of(batch)).logits[0]

    def question_features(self, samples: int | float, pictures: bool = True) -> Tensor:
        import torch

        found, base = [], self.branches.base
        with torch.no_grad(), streamed(base):
            for batch in self._pass(self.data.records, samples, "questions"):
                features = self.family.question_features(base, batch, pictures).cpu()
                found += [] if isinstance(batch, IdleBatch) else [features]
        return torch.cat(found) if found else torch.zeros(0, sum(self.feature_sizes(pictures)))

    def feature_sizes(self, pictures: bool = True) -> tuple[int, int]:
        return self.family.feature_sizes(self.branches.base, pictures)

    def groups(self) -> list[list[str]]:
        """Target layers that receive the same tensor; those that no text reaches are each for itself."""
        groups = self._reached_by_text()
        reached = {layer for group in groups for layer in group}
        return groups + [[layer] for layer in self.branches.layers if layer not in reached]

    # -- parts of the above --------------------------------------------------------------------------------------

    def _modules(self, layers: Sequence[str] | None = None) -> dict[str, Any]:
        chosen = self.branches.layers if layers is None else layers
        return {layer: self.branches.base.get_submodule(layer) for layer in chosen}

    def _reached_by_text(self) -> list[list[str]]:
        """Target layers that a conversation without pictures reaches, grouped by their input."""
        batch = self.data.inputs([Record("a text", (), (Turn("user", "?"), Turn("assistant", "!")))])
        self.branches.look_at(batch)
        return shared_inputs(self.family, self.branches.model, self._modules(), batch)

    def _idle_layers(self, records: Sequence[Record], samples: int | float) -> list[str]:
        """Target layers, such as a projector's, that a pass does not reach as none of its records has a picture."""
        if any(record.media for record in _chosen(records, samples)):
            return []
        reached = {layer for group in self._reached_by_text() for layer in group}
        return [layer for layer in self.branches.layers if layer not in reached]

    def _pass(self, records: Sequence[Record], samples: int | float, title: str) -> Iterator[dict]:
        """Model inputs over evenly spaced records; each process takes its share."""
        chosen = _chosen(records, samples)
        with progress_bar(f"{self.domain.name}: {title}", len(chosen) // distributed.world_size()) as advance:
            for batch in own_batches(self.branches.base, self.data.collate, chosen, self.batch_size):
                yield batch
                advance(0 if isinstance(batch, IdleBatch) else len(batch["labels"]))

    def _gradients(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Gradient of the summed loss over supervised tokens by trained parameter, and how many tokens they are."""
        import torch

        trained = self.branches.trainable()
        with evaluating(self.branches.model, checkpointing=True):  # the backward pass runs blocks again
            with as_in_training(self.branches.base):
                losses, _ = self.family.losses(self._logits(batch)[None], batch["labels"])
            found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        pairs = zip(trained.items(), found, strict=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}, losses.numel()

    def _logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        self.branches.look_at(batch)
        with self.family.supervised(self.branches.base, batch["labels"]):
            return self.branches.model(**inputs_of(batch)).logits[0]


def _chosen(records: Sequence[Record], samples: int | float) -> Sequence[Record]:
    is_share = samples < 1 or (samples == 1 and isinstance(samples, float))
    return evenly_spaced(records, max(1, round(samples * len(records))) if is_share else int(samples))
