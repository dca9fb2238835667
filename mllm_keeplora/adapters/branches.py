"""The adapters of a base model: the past restored, one branch open for training, its factors read back.

A thin layer over peft. The plan of what trains is stated here once (`trainable`) and asserted before every training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters.factors import Branch, Factors, concatenate, peft_settings
from mllm_keeplora.adapters.history import (
    PristineWeights,
    add_dense,
    choose_history,
    deltas_of,
    split_at_break_even,
    summed,
    weight_of,
)
from mllm_keeplora.models.dual.losses import HELD, OPEN, held_by
from mllm_keeplora.models.partition import assign, copy_of
from mllm_keeplora.models.running import evaluating

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters.mixers.mixing import Mixer, Mixing
    from mllm_keeplora.adapters.prototypes import Prototypes
    from mllm_keeplora.models import Base

PAST, OFFSET = "history", "offset"
PREFIX = "base_model.model."  # before a parameter's name where peft wraps the model


class Adapters:
    """Low-rank branches of one base model.

    Args:
        base: all its parameters frozen; its model is changed in place.
        history: `merged`, `factors` or `auto`.
        dropout: LoRA dropout of open branches.
        full: names of parameters that train in full beside the branch (the projector's with `projector: full`).

    Attributes:
        base: the base model itself, whose target layers peft may have wrapped.
        peft: peft's model around it while a branch is open or the past runs as one; else None.
    """

    def __init__(self, base: Base, history: str, dropout: float, full: tuple[str, ...] = ()):
        self.base, self.peft = base.model, None
        self.family, self.parts = base.family, base.parts
        self.layers = base.parts.target_layers
        self.mode = choose_history(history, base.model)
        self.dropout = dropout
        self.full = full
        self.branch: Branch | None = None
        self.past: list[Factors] = []
        self.past_full: list[dict[str, Tensor]] = []
        self.past_mixer: Mixer | None = None
        self.past_prototypes: dict[str, Prototypes] = {}
        self._dense: list[Any] = []  # handles of a past that runs as dense deltas
        self._mixing: Mixing | None = None
        self._trained: dict[str, Any] = {}  # found once for each open branch: strategies ask at every step
        self._start: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None  # A, B of a carried branch as it began
        self._pristine = PristineWeights(base.model, self.layers if self.mode == "merged" else (), full)

    @property
    def model(self) -> Any:
        """What runs: the base model, wrapped by peft while a branch is open or the past is one."""
        return self.base if self.peft is None else self.peft

    @property
    def mixer(self) -> Mixer | None:
        """The mixer that weighs the live branches now, trained or restored."""
        return self._mixing.mixer if self._mixing is not None else None

    def restore(
        self,
        past: list[Factors],
        past_full: list[dict[str, Tensor]],
        mixer: Mixer | None = None,
        prototypes: Mapping[str, Prototypes] | None = None,
    ) -> None:
        """Put the model where it was after `past` (in order); close an open branch without keeping it.

        Args:
            past, past_full: branches, and deltas of parameters trained in full.
            mixer: weighs the branches, which then run live; None where they are summed.
            prototypes: of classes, by the digest of their list.
        """
        self.past_prototypes = dict(prototypes or {})
        self._hold(self.past_prototypes)
        # take off whatever runs beside the base weights
        self.branch, self._start = None, None
        if self._mixing is not None:
            self._mixing.remove()
            self._mixing = None
        for handle in self._dense:
            handle.remove()
        self._dense = []
        if self.peft is not None:
            self.base, self.peft = self.peft.unload(), None

        self.past, self.past_full, self.past_mixer = list(past), list(past_full), mixer
        self._pristine.shift(self.past_full)
        if mixer is not None:
            self._pristine.merge([])
            self._run_live(mixer, self.past)
        elif self.mode == "merged":
            self._pristine.merge(self.past)
        elif self.past:
            together, dense = split_at_break_even(concatenate(self.past))
            self._dense = [add_dense(self.base.get_submodule(layer), delta) for layer, delta in dense.items()]
            self._add(PAST, together.A, together.B, together.alpha)
        self._freeze()

    def open(self, branch: Branch) -> None:
        """Open a branch for training, A and B as given. The function of the model does not change.

        Where B does not start at zero, a frozen branch of -B beside it stands for the reduced base weight; a carried
        branch stands in place of the past; beside one with a mixer that will answer the past runs live.
        """
        assert self.branch is None, "a branch is open already"
        past, full, past_mixer, mixer = self.past, self.past_full, self.past_mixer, branch.mixer
        is_past_live = mixer is not None and not mixer.in_training_alone
        if branch.carried or is_past_live:
            self.restore([], full)
            self.past, self.past_mixer = past, past_mixer
        if mixer is not None:
            self._run_live(mixer, past if is_past_live and not branch.carried else [])
        self.branch = branch
        if branch.prototypes is not None:
            self._hold({OPEN: branch.prototypes})
        self._add(OPEN, branch.A, branch.B, branch.alpha, self.dropout)
        if mixer is not None:
            shares, first = mixer.shares or 1, len(past) if is_past_live and not branch.carried else 0
            for layer, rank in branch.ranks.items():
                self._weigh(OPEN, layer, first, [rank // shares] * shares)
        elif branch.B and not branch.carried:
            self._add(OFFSET, branch.A, {layer: -B for layer, B in branch.B.items()}, branch.alpha)
        self._freeze()

    def look_at(self, batch: Mapping[str, Tensor]) -> None:
        """Let a mixer weigh live branches by a batch's questions; to be called before the model runs on it."""
        from mllm_keeplora.adapters.mixers.mixing import look_at

        look_at(self.base, batch)

    def trainable(self) -> dict[str, Any]:
        """Give the parameters that train now, the branch's and those in full, by their name within `model`."""
        return dict(self._trained)

    def is_full(self, name: str) -> bool:
        """Whether a name of `trainable` is a parameter of the base that is trained in full."""
        return name.removeprefix(PREFIX) in self.full

    def rate_of(self, name: str) -> float:
        """Give the learning rate of a name of `trainable` as a multiple of the run's: a mixer may have its own."""
        is_mixed = self._mixing is not None and name.removeprefix(PREFIX) in self._mixing.names
        return self._mixing.mixer.rate if is_mixed else 1.0

    def read(self) -> Factors:
        """Copy the open branch's factors to float32 on the CPU; a frozen A is the one it was opened with."""
        import torch

        assert self.branch is not None, "no branch is open"
        A, B, alpha = {}, {}, dict(self.branch.alpha)
        trained = "A" in self.branch.train
        for layer, start in self.branch.A.items():
            B[layer] = copy_of(self._factor(OPEN, "B", layer)).float().cpu()
            A[layer] = copy_of(self._factor(OPEN, "A", layer)).float().cpu() if trained else start
            if self.branch.carried or not self.branch.B:
                continue
            if trained:  # B A - B0 A0 has no common A: both pairs are kept
                A[layer] = torch.cat([A[layer], start.cpu()])
                B[layer] = torch.cat([B[layer], -self.branch.B[layer].cpu()], dim=1)
                alpha[layer] *= 2
            else:
                B[layer] -= self.branch.B[layer].cpu()
        return Factors(A, B, alpha)

    def read_full(self) -> dict[str, Tensor]:
        """Give what was added to the parameters trained in full since the branch was opened."""
        return self._pristine.shifted(self.past_full)

    def load(self, factors: Factors, full: dict[str, Tensor], prototypes: Prototypes | None = None) -> None:
        """Set the open branch to trained factors (a run continued after training)."""
        if prototypes is not None:
            assign(self.prototypes().P, prototypes.P.detach())
        A, B = factors.A, factors.B
        if self.branch.B and not self.branch.carried and "A" in self.branch.train:
            ranks = self.branch.ranks
            A = {layer: each[: ranks[layer]] for layer, each in A.items()}
            B = {layer: each[:, : ranks[layer]] for layer, each in B.items()}
        elif self.branch.B and not self.branch.carried:
            B = {layer: each + self.branch.B[layer] for layer, each in B.items()}
        self._fill(OPEN, A, B)
        self._pristine.shift([*self.past_full, full] if full else self.past_full)

    def prototypes(self) -> Prototypes | None:
        """Give the prototypes that train beside the open branch."""
        return held_by(self.base).get(OPEN)

    def weight(self, layer: str) -> Tensor:
        """Give the current weight (d_out, d_in) of a target layer: base and past, without any open branch."""
        weight = weight_of(self.base.get_submodule(layer))
        if self.mode == "factors" and any(layer in factors.A for factors in self.past):
            return summed(weight, deltas_of(layer, self.past))
        return weight

    def pristine(self, layer: str) -> Tensor:
        """Give the untouched weight (d_out, d_in) of a target layer."""
        kept = self._pristine.weights.get(layer)
        return weight_of(self.base.get_submodule(layer)) if kept is None else kept.whole()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Run the model as it was before the open branch, for teachers; what trains is the same afterwards."""
        assert self.branch is not None, "no branch is open"
        assert self._mixing is None, "a model with live branches has no closed state"
        # what is trained in place of the past is set back for the time, and kept beside
        carried, changed = self.branch.carried, [self.base.get_parameter(name) for name in self.full]
        if carried:
            changed += [self._factor(OPEN, part, layer) for part in "AB" for layer in getattr(self.branch, part)]
        trained = [copy_of(parameter) for parameter in changed]
        self._pristine.shift(self.past_full)
        if carried:
            if self._start is None:  # on the model's device: a teacher is asked at every micro-batch
                device = next(self.base.parameters()).device
                A, B = ({n: each.to(device) for n, each in part.items()} for part in (self.branch.A, self.branch.B))
                self._start = A, B
            self._fill(OPEN, *self._start)
        # the other branches run alone; without any, the base
        others = [name for name in self.peft.peft_config if name not in (OPEN, OFFSET) or carried]
        trains = {name for name, parameter in self.peft.named_parameters() if parameter.requires_grad}
        try:
            if others:
                self.peft.base_model.set_adapter(others)
            else:
                self.peft.base_model.disable_adapter_layers()
            with evaluating(self.model):
                yield
        finally:
            self.peft.base_model.enable_adapter_layers()
            self.peft.base_model.set_adapter(list(self.peft.peft_config))
            for name, parameter in self.peft.named_parameters():
                parameter.requires_grad_(name in trains)
            for parameter, values in zip(changed, trained, strict=True):
                assign(parameter, values)

    @contextmanager
    def plan_kept(self) -> Iterator[None]:
        """Assert before and after a training that exactly the stated parameters train."""
        self.assert_plan()
        yield
        self.assert_plan()

    def assert_plan(self) -> None:
        wanted = set(self._trained)
        found = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        assert wanted == found, f"trained but not planned: {sorted(found - wanted)}, missing: {sorted(wanted - found)}"

    # -- parts of the above ---------------------------------------------------------------------------------------

    def _hold(self, prototypes: Mapping[str, Prototypes]) -> None:
        """Let the base's family find prototypes on its model: of the open branch, or of lists by their digest."""
        from torch.nn import ModuleDict

        if hasattr(self.base, HELD):
            delattr(self.base, HELD)
        if prototypes:
            setattr(self.base, HELD, ModuleDict(prototypes).to(next(self.base.parameters()).device))

    def _run_live(self, mixer: Mixer, past: list[Factors]) -> None:
        """Run past branches as one whose rank coordinates the mixer weighs."""
        from mllm_keeplora.adapters.mixers.mixing import Mixing

        self._mixing = Mixing(self.base, mixer, self.family, self.parts.projectors)
        if not past:
            return
        together = concatenate([factors.unweighted() for factors in past])
        self._add(PAST, together.A, together.B, together.alpha)
        for layer in together.A:
            ranks = [factors.A[layer].shape[0] if layer in factors.A else 0 for factors in past]
            if mixer.shares is not None:
                ranks = [sum(ranks) // mixer.shares] * mixer.shares
            self._weigh(PAST, layer, 0, ranks)

    def _weigh(self, name: str, layer: str, first: int, ranks: list[int]) -> None:
        module = self.base.get_submodule(layer)
        self._mixing.apply(layer, module.lora_A[name], module.lora_B[name], first, ranks)

    def _add(
        self, name: str, A: dict[str, Tensor], B: dict[str, Tensor], alpha: dict[str, float], dropout: float = 0.0
    ) -> None:
        """Add a branch, float32 whatever the base is, beside those that run already; without B it starts at zero."""
        from peft import LoraConfig, PeftModel

        if not A:
            return
        ranks = {layer: tensor.shape[0] for layer, tensor in A.items()}
        config = LoraConfig(**peft_settings(ranks, alpha, dropout) | {"inference_mode": False})
        if self.peft is None:
            self.peft = PeftModel(self.base, config, adapter_name=name)
        else:
            self.peft.add_adapter(name, config)
        device = next(self.base.parameters()).device
        for layer in A:
            module = self.base.get_submodule(layer)
            module.lora_A[name].float().to(device)
            module.lora_B[name].float().to(device)
        self.peft.base_model.set_adapter(list(self.peft.peft_config))
        self._fill(name, A, B)

    def _fill(self, name: str, A: dict[str, Tensor], B: dict[str, Tensor]) -> None:
        """Set a branch's factors; an empty B stands for zeros."""
        import torch

        for layer, tensor in A.items():
            assign(self._factor(name, "A", layer), tensor)
            assign(self._factor(name, "B", layer), B[layer] if B else torch.zeros(()))

    def _factor(self, name: str, part: str, layer: str) -> Any:
        """A branch's A or B, as a parameter."""
        return getattr(self.base.get_submodule(layer), f"lora_{part}")[name].weight

    def _freeze(self) -> None:
        """State the plan of what trains, and let nothing else."""
        chosen, marks, self._trained = set(), [], {}
        if self.branch is not None:
            chosen = {*self.full, *(self._mixing.names if self._mixing is not None else ())}
            chosen |= {f"{HELD}.{OPEN}.P"}
            marks = [f".lora_{part}.{OPEN}." for part in self.branch.train]
        for name, parameter in self.model.named_parameters():
            trains = name.removeprefix(PREFIX) in chosen or any(mark in name for mark in marks)
            parameter.requires_grad_(trains)
            if trains:
                self._trained[name] = parameter
        self.model.eval()  # the Trainer switches to training by itself; everything else answers or probes


def adapters_for(base: Base, projector: str, history: str, dropout: float = 0.0) -> Adapters:
    """Make the adapters of a loaded base that a run's `adapters` section asks for; `full` trains the projector."""
    full: tuple[str, ...] = ()
    if projector == "full":
        starts = tuple(f"{projector}." for projector in base.parts.projectors)
        full = tuple(name for name, _ in base.model.named_parameters() if name.startswith(starts))
    return Adapters(base, history, dropout, full)
