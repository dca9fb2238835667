"""The context that strategies work through: data passes, branches, kept bases, reduce and log of one domain."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from mllm_keeplora.data.collate import TrainCollator, batches, evenly_spaced, joined
from mllm_keeplora.data.schema import Record, Turn
from mllm_keeplora.models.causal.logits import supervised_logits
from mllm_keeplora.models.causal.losses import token_losses
from mllm_keeplora.models.partition import IdleBatch, assign, copy_of, streamed
from mllm_keeplora.models.running import as_in_training, evaluating
from mllm_keeplora.probes.features import collect_moments, exact_passes, shared_inputs
from mllm_keeplora.probes.gradients import collect_mean_gradients
from mllm_keeplora.probes.plans import EXACT_FEATURES, EXACT_GRADIENTS, FeaturePlan, GradientPlan
from mllm_keeplora.strategies import DomainInfo
from mllm_keeplora.system import dealing, distributed
from mllm_keeplora.system.progress import progress_bar
from mllm_keeplora.training.passes import Sources, own_batches

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
        collator: turns records into model inputs.
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
        collator: TrainCollator,
        rng: torch.Generator,
        probe_batch_size: int,
        sources: Sources | None = None,
        seed: int = 0,
    ):
        self.base = base
        self.branches = branches
        self.kept = kept
        self.domain = domain
        self.records = records
        self.collator = collator
        self.rng = rng
        self.probe_batch_size = probe_batch_size
        self.sources = sources or Sources()
        self.seed = seed
        self.share = (distributed.rank(), distributed.world_size())  # this process's of a draw: see `micro_batch`
        self.full_batch = max(1, len(records))  # records of a whole optimizer step: the training says how many
        self.tokens_each: Tensor | None = None  # mean answer tokens of a step's micro-batches: the training says
        self.answering: Mixer | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.step = 0
        self.facts: dict[str, Any] = {}
        self.forgotten: dict[str, list[int]] = {}

    @property
    def target_layers(self) -> tuple[str, ...]:
        return self.branches.layers

    def weight(self, layer: str) -> Tensor:
        return self.branches.weight(layer)

    def d_in(self, layer: str) -> int:
        return self.branches.base.get_submodule(layer).in_features

    def depth(self, layer: str) -> int | None:
        return self.base.parts.depth(layer)

    def shared_inputs(self) -> list[list[str]]:
        groups = self._reached_by_text()
        reached = {layer for group in groups for layer in group}
        return groups + [[layer] for layer in self.target_layers if layer not in reached]

    def collect_inputs(
        self,
        samples: int | float,
        plan: FeaturePlan = EXACT_FEATURES,
        of: Sequence[str] = (),
        layers: Sequence[str] | None = None,
    ) -> dict[str, MomentAccumulator | FrequentDirections]:
        records = self.records
        if of:  # answers of anchors are not used: the first question of each, whose tokens see no answer
            records = [record.first_exchange() for name in of for record in self.sources.anchors(name)]
            plan = plan.of_questions()
        batches = self._pass(records, samples, "anchors" if of else "features")
        idle = self._idle_layers(records, samples)
        return collect_moments(self.branches.model, self._modules(layers), batches, plan, idle)

    def exact_passes(self, plan: FeaturePlan) -> list[list[str]] | None:
        return exact_passes(self.shared_inputs(), self._modules(), plan) if plan.statistic == "auto" else None

    def collect_weight_gradients(
        self, samples: int | float, plan: GradientPlan = EXACT_GRADIENTS
    ) -> dict[str, GradientAccumulator | GradientSketch]:
        batches = self._pass(self.records, samples, "gradient")
        idle = self._idle_layers(self.records, samples)
        return collect_mean_gradients(self.branches.model, self._modules(), batches, plan, idle)

    def forget(self, layer: str, columns: Sequence[int]) -> None:
        if layer in self.forgotten:
            raise RuntimeError(f"columns of {layer} were forgotten already in this stage")
        self.kept[layer].forget(columns)
        self.forgotten[layer] = sorted(columns)

    def teacher_forward(self, batch: Mapping[str, Any]) -> Any:
        import torch

        model = self.branches.model
        with torch.no_grad(), self.branches.closed(), supervised_logits(self.branches.base, batch["labels"]):
            return model(**{key: value for key, value in batch.items() if key != "labels"})

    def token_mean(self, values: Tensor) -> Tensor:
        return values.mean() if self.tokens_each is None else values.sum() / self.tokens_each

    @property
    def num_records(self) -> int:
        return len(self.records)

    @property
    def batch_size(self) -> int:
        done = self.step % math.ceil(len(self.records) / self.full_batch) * self.full_batch  # in this epoch
        return min(self.full_batch, len(self.records) - done)

    def drawn(self, population: int, count: int) -> list[int]:
        draws = random.Random(f"{self.seed} {self.step}")
        place, places = self.share
        return [draws.randrange(population) for _ in range(count)][place::places]

    @contextmanager
    def micro_batch(self, number: int, count: int) -> Iterator[None]:
        """Within it, what is drawn is the part of one of so many micro-batches of the optimizer step."""
        rank, world = whole = self.share
        self.share = (number * world + rank, count * world)
        try:
            yield
        finally:
            self.share = whole

    def batch_of(self, references: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        records = [self.of_domain(domain)[index] for domain, index in references]
        device = next(self.branches.base.parameters()).device
        return {key: value.to(device) for key, value in self.collator(records).items()}

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return joined(first, second, self.collator.prompt.tokenizer.pad_token_id)

    def answer_logits(self, references: Sequence[tuple[int, int]]) -> Tensor:
        trains = self.optimizer is not None
        assert not (trains and self.branches.mixer), "live branches are weighed for one batch at a time in a training"
        with evaluating(self.branches.model):
            return self._answer_logits(self.batch_of(references))

    def loss_gradients(self, references: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """Of the mean loss over the answers' tokens of all processes' records, a few records at a time."""
        import torch

        sums = {name: torch.zeros_like(parameter) for name, parameter in self.branches.trainable().items()}
        count = torch.zeros(1, device=next(iter(sums.values())).device)
        for part in batches(references, self.probe_batch_size):
            found, tokens = self._gradients(self.batch_of(part))
            sums = {name: total + found[name] for name, total in sums.items()}
            count += tokens
        distributed.all_reduce([*sums.values(), count])
        return {name: each / count for name, each in sums.items()}

    def record_gradients(self, samples: int | float) -> Iterator[dict[str, Tensor]]:
        chosen = self._chosen(self.records, samples)
        with progress_bar(f"{self.domain.name}: gradients", len(chosen) // distributed.world_size()) as advance:
            for batch in own_batches(self.branches.base, self.collator, chosen, 1):
                yield self._gradients(batch)[0]
                advance()

    def prompt_features(self, samples: int | float, pictures: bool = True) -> Tensor:
        import torch

        from mllm_keeplora.adapters.mixers.features import feature_sizes, prompt_features

        found = []
        with torch.no_grad(), streamed(self.branches.base):
            for batch in self._pass(self.records, samples, "questions"):
                features = prompt_features(batch, self.branches.base, pictures).cpu()
                found += [] if isinstance(batch, IdleBatch) else [features]
        return torch.cat(found) if found else torch.zeros(0, sum(feature_sizes(self.branches.base, pictures)))

    def answer_with(self, mixer: Mixer) -> None:
        self.answering = mixer

    def gathered(self, rows: Tensor) -> Tensor:
        return distributed.interleaved(rows)

    def reduce(self, tensors: list[Tensor]) -> None:
        distributed.all_reduce(tensors)

    def divided(
        self, load: Callable[[str], S], work: Callable[[str, S], T], layers: Iterable[str] | None = None
    ) -> dict[str, T]:
        chosen = self.target_layers if layers is None else layers
        costs = {layer: float(self.d_in(layer)) ** 3 for layer in chosen}  # of a decomposition
        return dealing.divided(costs, load, work)

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

    def _modules(self, layers: Sequence[str] | None = None) -> dict[str, Any]:
        chosen = self.target_layers if layers is None else layers
        return {layer: self.branches.base.get_submodule(layer) for layer in chosen}

    def _reached_by_text(self) -> list[list[str]]:
        """Target layers that a conversation without pictures reaches, grouped by their input."""
        text = Record("a text", (), (Turn("user", "?"), Turn("assistant", "!")))
        device = next(self.branches.base.parameters()).device
        batch = {key: value.to(device) for key, value in self.collator([text]).items()}
        self.branches.look_at(batch)
        return shared_inputs(self.branches.model, self._modules(), batch)

    def _idle_layers(self, records: Sequence[Record], samples: int | float) -> list[str]:
        """Target layers, such as a projector's, that a pass does not reach as none of its records has a picture."""
        if any(record.media for record in self._chosen(records, samples)):
            return []
        reached = {layer for group in self._reached_by_text() for layer in group}
        return [layer for layer in self.target_layers if layer not in reached]

    def _pass(self, records: Sequence[Record], samples: int | float, title: str) -> Iterator[dict]:
        """Model inputs over evenly spaced records; each process takes its share."""
        chosen = self._chosen(records, samples)
        with progress_bar(f"{self.domain.name}: {title}", len(chosen) // distributed.world_size()) as advance:
            for batch in own_batches(self.branches.base, self.collator, chosen, self.probe_batch_size):
                yield batch
                advance(0 if isinstance(batch, IdleBatch) else len(batch["labels"]))

    def _chosen(self, records: Sequence[Record], samples: int | float) -> Sequence[Record]:
        is_share = samples < 1 or (samples == 1 and isinstance(samples, float))
        return evenly_spaced(records, max(1, round(samples * len(records))) if is_share else int(samples))

    def of_domain(self, index: int) -> Sequence[Record]:
        """Training records of a domain that is or was learnt, by its place."""
        return self.records if index == self.domain.index else self.sources.domain(index)

    def _gradients(self, batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Gradient of the summed loss over the answers' tokens by trained parameter, and how many tokens they are."""
        import torch

        trained = self.branches.trainable()
        with evaluating(self.branches.model, checkpointing=True):  # the backward pass runs blocks again
            with as_in_training(self.branches.base):
                losses = token_losses(self._answer_logits(batch)[None], batch["labels"])
            found = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        pairs = zip(trained.items(), found, strict=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}, losses.numel()

    def _answer_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        self.branches.look_at(batch)
        with supervised_logits(self.branches.base, batch["labels"]):
            return self.branches.model(**inputs).logits[0]
