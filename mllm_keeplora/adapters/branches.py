"""The adapters of a base model: the past restored, one branch open for training, its factors read back.

A thin layer over peft. The plan of what trains is stated here once (`trainable`) and asserted before every training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters.dense import DenseDeltas, split_at_break_even
from mllm_keeplora.adapters.factors import Branch, Factors, concatenate
from mllm_keeplora.adapters.history import PristineWeights, choose_history, weight_of
from mllm_keeplora.adapters.peft_branches import PeftBranches
from mllm_keeplora.models.partition import assign, copy_of
from mllm_keeplora.models.running import evaluating

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters.mixers.mixing import Mixer, Mixing
    from mllm_keeplora.models import Base

OPEN, PAST, OFFSET = "domain", "history", "offset"


class Adapters:
    """Low-rank branches of one base model.

    Args:
        base: all its parameters frozen; its model is changed in place.
        history: `merged`, `factors` or `auto`.
        dropout: LoRA dropout of open branches.
        full: names of parameters that train in full beside the branch (the projector's with `projector: full`).
    """

    def __init__(self, base: Base, history: str, dropout: float, full: tuple[str, ...] = ()):
        self._peft = PeftBranches(base.model)
        self.family, self.parts = base.family, base.parts
        self.layers = base.parts.target_layers
        self.mode = choose_history(history, base.model)
        self.dropout = dropout
        self.full = full
        self.branch: Branch | None = None
        self.past: list[Factors] = []
        self.past_full: list[dict[str, Tensor]] = []
        self.past_mixer: Mixer | None = None
        self._dense: DenseDeltas | None = None
        self._mixing: Mixing | None = None
        self._trained: dict[str, Any] = {}  # found once for each open branch: strategies ask at every step
        self._start: tuple[dict[str, Tensor], dict[str, Tensor] | None] | None = None  # A, B as the branch began
        self._pristine = PristineWeights(base.model, self.layers if self.mode == "merged" else (), full)

    @property
    def model(self) -> Any:
        """What runs: the base model, wrapped by peft while a branch is open or the past is one."""
        return self.base if self.peft is None else self.peft

    @property
    def base(self) -> Any:
        """The base model itself, whose target layers peft may have wrapped."""
        return self._peft.base

    @property
    def peft(self) -> Any:
        """peft's model while a branch is open or the past runs as one; else None."""
        return self._peft.peft

    def restore(self, past: list[Factors], past_full: list[dict[str, Tensor]], mixer: Mixer | None = None) -> None:
        """Put the model where it was after `past` (in order); closes an open branch without keeping it.

        Args:
            past, past_full: branches, and deltas of parameters trained in full.
            mixer: weighs the branches, which then run live; None where they are summed.
        """
        self._unload()
        self.past, self.past_full, self.past_mixer = list(past), list(past_full), mixer
        self._pristine.shift(self.past_full)
        if mixer is not None:
            self._pristine.merge([])
            self._run_live(mixer)
        elif self.mode == "merged":
            self._pristine.merge(self.past)
        elif self.past:
            together, dense = split_at_break_even(concatenate(self.past))
            self._dense = DenseDeltas(self.base, dense)
            self._peft.add(PAST, together.A, together.alpha)
            self._peft.fill(PAST, together.A, together.B)
        self._freeze()

    def open(self, branch: Branch) -> None:
        """Open a branch for training, A and B as given. The function of the model does not change.

        Where B does not start at zero, a frozen branch of -B beside it stands for the reduced base weight; a carried
        branch stands in place of the past; beside one with a mixer the past runs live.
        """
        assert self.branch is None, "a branch is open already"
        past, full, past_mixer = self.past, self.past_full, self.past_mixer
        if branch.carried or branch.mixer is not None:
            self.restore([], full)
            self.past, self.past_mixer = past, past_mixer
        if branch.mixer is not None:
            self._run_live(branch.mixer, branch)
        self.branch = branch
        self._peft.add(OPEN, branch.A, branch.alpha, self.dropout)
        self._peft.fill(OPEN, branch.A, branch.B or None)
        if branch.mixer is not None:
            self._weigh_open(branch)
        elif branch.B and not branch.carried:
            self._peft.add(OFFSET, branch.A, branch.alpha)
            self._peft.fill(OFFSET, branch.A, {layer: -B for layer, B in branch.B.items()})
        self._freeze()

    @property
    def mixer(self) -> Mixer | None:
        """What weighs the live branches now, trained or restored."""
        return self._mixing.mixer if self._mixing is not None else None

    def look_at(self, batch: Mapping[str, Tensor]) -> None:
        """To be called before the model runs on a batch: live branches are weighed by its questions."""
        if self._mixing is not None:
            from mllm_keeplora.adapters.mixers.mixing import look_at

            look_at(self.base, batch)

    def trainable(self) -> dict[str, Any]:
        """Parameters that train now, by their name within `model`: of the open branch, and those trained in full."""
        return dict(self._trained)

    def is_full(self, name: str) -> bool:
        """Whether a name of `trainable` is a parameter of the base that is trained in full."""
        return name.removeprefix("base_model.model.") in self.full

    def rate_of(self, name: str) -> float:
        """Learning rate of a name of `trainable`, as a multiple of the run's: a mixer may have its own."""
        is_mixed = self._mixing is not None and name.removeprefix("base_model.model.") in self._mixing.names
        return self._mixing.mixer.rate if is_mixed else 1.0

    def read(self) -> Factors:
        """The open branch's factors, copied to float32 on the CPU; a frozen A is the one it was opened with."""
        import torch

        assert self.branch is not None, "no branch is open"
        A, B, alpha = {}, {}, dict(self.branch.alpha)
        for layer in self.branch.A:
            module = self._peft.module(layer)
            trained = "A" in self.branch.train
            B[layer] = copy_of(module.lora_B[OPEN].weight).float().cpu()
            A[layer] = copy_of(module.lora_A[OPEN].weight).float().cpu() if trained else self.branch.A[layer]
            if self.branch.carried:
                continue
            if self.branch.B and not trained:
                B[layer] -= self.branch.B[layer].cpu()
            elif self.branch.B:  # B A - B0 A0 has no common A: both pairs are kept
                A[layer] = torch.cat([A[layer], self.branch.A[layer].cpu()])
                B[layer] = torch.cat([B[layer], -self.branch.B[layer].cpu()], dim=1)
                alpha[layer] *= 2
        return Factors(A, B, alpha)

    def read_full(self) -> dict[str, Tensor]:
        """What was added to the parameters trained in full since the branch was opened."""
        return self._pristine.shifted(self.past_full)

    def load(self, factors: Factors, full: dict[str, Tensor]) -> None:
        """Set the open branch to trained factors (a run continued after training)."""
        A, B = factors.A, factors.B
        if self.branch.B and not self.branch.carried and "A" in self.branch.train:
            ranks = self.branch.ranks
            A = {layer: each[: ranks[layer]] for layer, each in A.items()}
            B = {layer: each[:, : ranks[layer]] for layer, each in B.items()}
        elif self.branch.B and not self.branch.carried:
            B = {layer: each + self.branch.B[layer] for layer, each in B.items()}
        self._peft.fill(OPEN, A, B)
        self._pristine.shift([*self.past_full, full] if full else self.past_full)

    def weight(self, layer: str) -> Tensor:
        """Current weight (d_out, d_in) of a target layer: base and past, without any open branch."""
        weight = weight_of(self.base.get_submodule(layer))
        if self.mode == "factors":
            for factors in self.past:
                if layer in factors.A:
                    weight = weight.detach().float() + factors.delta(layer).to(weight.device)
        return weight

    def pristine(self, layer: str) -> Tensor:
        """Untouched weight (d_out, d_in) of a target layer."""
        if layer in self._pristine.weights:
            return self._pristine.weights[layer].whole()
        return weight_of(self.base.get_submodule(layer))

    @contextmanager
    def closed(self) -> Iterator[None]:
        """The model as it was before the open branch: for teachers. What trains, and how, is the same afterwards."""
        assert self.branch is not None, "no branch is open"
        assert self._mixing is None, "a model with live branches has no closed state"
        full = {name: self.base.get_parameter(name) for name in self.full}
        if self.branch.carried:  # its start is the past
            for part, start in (("A", self.branch.A), ("B", self.branch.B)):
                full |= {(part, layer): self._peft.factor(OPEN, part, layer) for layer in start}
        trained = {key: copy_of(parameter) for key, parameter in full.items()}
        self._pristine.shift(self.past_full)
        if self.branch.carried:
            self._peft.fill(OPEN, *self._start_at_hand())
        others = [name for name in self.peft.peft_config if name not in (OPEN, OFFSET) or self.branch.carried]
        try:
            with evaluating(self.model), self._peft.only(others):
                yield
        finally:
            for key, values in trained.items():
                assign(full[key], values)

    def _start_at_hand(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """What the open branch began with, on the model's device: a teacher is asked at every micro-batch."""
        if self._start is None:
            device, branch = next(self.base.parameters()).device, self.branch
            A, B = ({layer: values.to(device) for layer, values in each.items()} for each in (branch.A, branch.B))
            self._start = A, B or None
        return self._start

    @contextmanager
    def plan_kept(self) -> Iterator[None]:
        """Assert before and after a training that exactly the stated parameters train."""
        self.assert_plan()
        yield
        self.assert_plan()

    def assert_plan(self) -> None:
        wanted = set(self.trainable())
        found = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        assert wanted == found, f"trained but not planned: {sorted(found - wanted)}, missing: {sorted(wanted - found)}"

    # -- parts of the above ---------------------------------------------------------------------------------------

    def _run_live(self, mixer: Mixer, branch: Branch | None = None) -> None:
        """Past branches as one whose rank coordinates the mixer weighs."""
        from mllm_keeplora.adapters.mixers.mixing import Mixing

        self._mixing = Mixing(self.base, mixer, self.family, self.parts.projectors)
        past = [] if branch is not None and branch.carried else [factors.unweighted() for factors in self.past]
        if not past:
            return
        together = concatenate(past)
        self._peft.add(PAST, together.A, together.alpha)
        self._peft.fill(PAST, together.A, together.B)
        for layer in together.A:
            ranks = [factors.A[layer].shape[0] if layer in factors.A else 0 for factors in past]
            if mixer.shares is not None:
                ranks = [sum(ranks) // mixer.shares] * mixer.shares
            self._mixing.apply(layer, self._peft.module(layer).lora_A[PAST], 0, ranks)

    def _weigh_open(self, branch: Branch) -> None:
        shares = branch.mixer.shares or 1
        first = 0 if branch.carried else len(self.past)
        for layer, rank in branch.ranks.items():
            self._mixing.apply(layer, self._peft.module(layer).lora_A[OPEN], first, [rank // shares] * shares)

    def _planned(self) -> dict[str, Any]:
        if self.branch is None:
            return {}
        mixed = set(self._mixing.names) if self._mixing is not None else set()
        chosen = {}
        for name, parameter in self.model.named_parameters():
            plain = name.removeprefix("base_model.model.")
            in_branch = any(f".lora_{part}.{OPEN}." in name for part in self.branch.train)
            if in_branch or plain in self.full or plain in mixed:
                chosen[name] = parameter
        return chosen

    def _freeze(self) -> None:
        self._trained = self._planned()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._trained)
        self.model.eval()  # the Trainer switches to training by itself; everything else answers or probes

    def _unload(self) -> None:
        self.branch, self._trained, self._start = None, {}, None
        if self._mixing is not None:
            self._mixing.remove()
            self._mixing = None
        if self._dense is not None:
            self._dense.remove()
            self._dense = None
        self._peft.unload()


def adapters_for(base: Base, projector: str, history: str, dropout: float = 0.0) -> Adapters:
    """Adapters of a loaded base as a run's `adapters` section asks for them; `full` trains the projector itself."""
    full: tuple[str, ...] = ()
    if projector == "full":
        starts = tuple(f"{projector}." for projector in base.parts.projectors)
        full = tuple(name for name, _ in base.model.named_parameters() if name.startswith(starts))
    return Adapters(base, history, dropout, full)
