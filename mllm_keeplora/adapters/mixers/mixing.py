"""How live branches combine: a weight for every rank coordinate, applied between A and B.

A branch that is merged answers alike to every question. A mixer keeps the branches of past domains live beside the base
weights and weighs them: by a number (magnitudes), by the question (gates, a router), or token by token (experts).
One whose `attach` is its own does something else there (transforms).
It runs the same in training, in data passes and in generation, where its weights are found once per question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm_keeplora.models.family import Family
from mllm_keeplora.models.partition import streamed

NAME = "branch_mixer"  # the mixer's place within the base model


class Mixer(nn.Module):
    """Weigh the parts of the live branches: one part for each unit of the sequence, or equal shares of one branch.

    Its parameters that require a gradient when the branch is opened train with it. The keywords in `settings` (plain
    JSON values) and the state dict together are all that is stored of it.

    Attributes:
        kind: its name in `adapters.mixers`.
        in_training_alone: it weighs the open branch while it trains, the past stays merged, and nothing of it answers.
        shares: into how many equal parts a single, carried branch is divided; None where each unit's branch is a part.
        rate: learning rate of its parameters, as a multiple of the run's.
        weights: (b, parts) of the questions last looked at, or (parts,) where all are answered alike.
        family, projectors: of the base that it stands in; beginnings of the names of its projectors' layers.
    """

    kind: ClassVar[str]
    in_training_alone: ClassVar[bool] = False
    shares: int | None = None
    rate: float = 1.0
    family: Family
    projectors: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.weights: Tensor | None = None
        self._asked: Tensor | None = None
        self._rows_of: Callable[[int], Tensor] | None = None
        self._sizes: dict[int, Tensor] = {}  # of so many rows in a projector, those that belong to each question

    def settings(self) -> dict[str, Any]:
        """Give the keywords of the constructor."""
        return {}

    def stored(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give facts and tensors that `mixers.rebuilt` makes it of again."""
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}
        return {"kind": self.kind, "settings": self.settings()}, tensors

    def weigh(self, batch: Mapping[str, Tensor], model: Any) -> Tensor | None:
        """Find the weights of a batch of questions: (b, parts), (parts,), or None where `of` finds them by itself.

        Args:
            batch: model inputs, with `labels` where there are answers; what is answered must not change the weights.
            model: the base model, which a mixer may run parts of (its frozen tower).
        """
        raise NotImplementedError

    def of(self, layer: str, x: Tensor) -> Tensor:
        """Give the weights of the parts for a layer's input x (..., d_in): to be broadcast over its rows."""
        assert self.weights is not None, "a mixer is asked before it has looked at a batch"
        return self.weights if self.weights.ndim == 1 else self._by_row(layer, x.shape[:-1], self.weights)

    def attach(self, layer: str, down: Any, up: Any, first: int, ranks: Sequence[int]) -> list[Any]:
        """Hook a layer's `lora_A` and `lora_B`, and give the handles.

        Here the output of `lora_A`, (..., sum of ranks), is weighed: of the part `first` and those that follow.
        """
        parts = slice(first, first + len(ranks))
        places = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)).to(down.weight.device)

        def hook(module: Any, args: tuple, output: Tensor) -> Tensor:
            weights = self.of(layer, args[0])[..., parts].index_select(-1, places)
            return output * weights.to(output.dtype)

        return [down.register_forward_hook(hook)]

    def look_at(self, batch: Mapping[str, Tensor], model: Any) -> None:
        """Find the weights of a batch before the model runs on it."""
        self._asked, self._sizes = batch["input_ids"], {}
        self._rows_of = partial(self.family.rows_by_question, model, batch)
        self.weights = self.weigh(batch, model)

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some rows of the batch: the answers of the others have ended."""
        if self.weights is not None and self.weights.ndim == 2:
            self.weights = self.weights[rows]

    def trained(self) -> tuple[str, ...]:
        """Name the parameters that require a gradient."""
        return tuple(name for name, parameter in self.named_parameters() if parameter.requires_grad)

    def _by_row(self, layer: str, lead: torch.Size, weights: Tensor) -> Tensor:
        """The weights of each question at its rows: its tokens, or in a projector those of its pictures."""
        rows = lead.numel()
        if layer.startswith(self.projectors):
            if rows not in self._sizes:
                self._sizes[rows] = self._rows_of(rows).to(weights.device)
            return weights.repeat_interleave(self._sizes[rows], dim=0).view(*lead, -1)
        if lead[0] == len(weights):
            return weights.view(len(weights), *[1] * (len(lead) - 1), -1)
        return weights.repeat_interleave(rows // len(weights), dim=0).view(*lead, -1)  # questions one behind the other

    def refuse_unseen(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse to run on a batch that was not looked at; a forward pre-hook of the base model."""
        tokens = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if tokens is None or (cache is not None and cache.get_seq_length() > 0):
            return  # a later token of an answer
        if self._asked is not tokens and (self._asked is None or not torch.equal(self._asked, tokens)):
            raise RuntimeError("the model runs on a batch that its mixer of branches has not looked at")


def module_name(layer: str) -> str:
    """Name a layer's module within a mixer: without dots, and not as the layer, or peft would adapt it, too."""
    return layer.replace(".", "/") if "." in layer else f"/{layer}"


def mixer_of(model: Any) -> Mixer | None:
    """Find the mixer of a model's live branches, if it has any."""
    return getattr(model, NAME, None)


def look_at(model: Any, batch: Mapping[str, Tensor]) -> None:
    """Let a model with live branches look at a batch; to be called before each run on one."""
    mixer = mixer_of(model)
    if mixer is not None:
        with streamed(model), torch.set_grad_enabled(torch.is_grad_enabled() and bool(mixer.trained())):
            mixer.look_at(batch, model)


def keep_rows(model: Any) -> Callable[[Tensor], None]:
    """Give what is to be told which rows of a batch go on where the answers of others have ended."""
    mixer = mixer_of(model)
    return (lambda kept: None) if mixer is None else mixer.keep_rows


class Mixing:
    """A mixer in its place within a base model, and the hooks that apply its weights; all gone after `remove`.

    The mixer is moved to the model's device; `projectors` are names of the modules between the towers.
    """

    def __init__(self, model: Any, mixer: Mixer, family: Family, projectors: Sequence[str]):
        self.model = model
        mixer.family = family
        self.mixer = mixer.to(next(model.parameters()).device)
        self.names = [f"{NAME}.{name}" for name in mixer.trained()]  # in `model`; peft will take the marks off
        mixer.projectors = tuple(f"{name}." for name in projectors)
        model.add_module(NAME, self.mixer)
        self._handles = [model.register_forward_pre_hook(mixer.refuse_unseen, with_kwargs=True)]

    def apply(self, layer: str, down: Any, up: Any, first: int, ranks: Sequence[int]) -> None:
        """Let the mixer work in a layer, as `Mixer.attach` says."""
        self._handles += self.mixer.attach(layer, down, up, first, ranks)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        delattr(self.model, NAME)
