"""Training stages of `tiny-llava`: the tower on dense cell targets, then everything on questions."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mllm_keeplora.mini.general_scenes import HUES, KINDS
from mllm_keeplora.mini.vocabulary import EOS, vocabulary

from .batches import Batches
from .corpus import Corpus
from .muon import Muon
from .network import DenseHeads, language_states, patch_features, to_pixel_values

TOKENS = vocabulary()
EOS_ID = TOKENS.index(EOS)
WORD_SCALE = 20.0  # cosines to logits
CHECKPOINT_EVERY, GATE_EVERY = 100, 500  # steps
TOWER_BATCH, QUESTION_BATCH, TEXT_BATCH = 64, 32, 24  # over all processes


def autocast():
    """bfloat16 matrix products where the CPU has them (2.5 times as fast as float32; 15 times slower where not)."""
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported())


def rate(progress: float, warmup: float = 0.02, decay_from: float = 0.6) -> float:
    """Share of the peak learning rate: short warm-up, constant, cosine to (almost) zero."""
    if progress < warmup:
        return (progress + 1e-4) / warmup
    if progress < decay_from:
        return 1.0
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - decay_from) / (1 - decay_from)))


class Optimizers:
    """Muon for the hidden matrices, shared out over the processes, and AdamW for everything else."""

    def __init__(self, modules: list[nn.Module], lr: float, muon_lr: float):
        hidden, rest = [], []
        for module in modules:
            for name, parameter in module.named_parameters():
                in_layer = "layers" in name or "multi_modal_projector" in name
                (hidden if parameter.ndim == 2 and in_layer else rest).append(parameter)
        size = dist.get_world_size()
        self.shares = [hidden[rank::size] for rank in range(size)]
        own = self.shares[dist.get_rank()]
        muon = Muon(own, lr=muon_lr)
        self.parts = [(torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.05), lr), (muon, muon_lr)]
        self.parameters = hidden + rest

    def step(self, share: float) -> None:
        """Average gradients over processes, clip, set the rates to `share` of their peaks, update, clear."""
        active = [p for p in self.parameters if p.grad is not None]
        flat = _flatten_dense_tensors([p.grad for p in active])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, grad in zip(active, _unflatten_dense_tensors(flat, [p.grad for p in active]), strict=True):
            parameter.grad = grad
        nn.utils.clip_grad_norm_(active, 1.0)
        for optimizer, peak in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()
        with torch.no_grad():
            for owner, parameters in enumerate(self.shares):
                flat = _flatten_dense_tensors([p.data for p in parameters])
                dist.broadcast(flat, owner)
                for parameter, value in zip(parameters, _unflatten_dense_tensors(flat, parameters), strict=True):
                    parameter.copy_(value)
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer, _ in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for (optimizer, _), state in zip(self.parts, states, strict=True):
            optimizer.load_state_dict(state)


class Keeper:
    """Writes a resumable state of this process every CHECKPOINT_EVERY steps and finds it again."""

    def __init__(self, work: Path, stage: str, parts: dict):
        self.path, self.parts = work / f"{stage}.{dist.get_rank()}.pt", parts
        self.seconds, self.started = 0.0, time.monotonic()

    def load(self) -> int:
        """The step to continue at; 0 if there is no state."""
        state = {"step": 0}
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.seconds = state["seconds"]
        steps: list = [None] * dist.get_world_size()
        dist.all_gather_object(steps, state["step"])
        if len(set(steps)) > 1:
            raise ValueError(f"the processes' states are of different steps {steps}; delete {self.path.parent}/*.pt")
        return state["step"]

    def save(self, step: int, last: bool) -> bool:
        """Write if it is time; True if written."""
        if step % CHECKPOINT_EVERY and not last:
            return False
        state = {name: part.state_dict() for name, part in self.parts.items()}
        seconds = self.seconds + time.monotonic() - self.started
        temporary = self.path.with_suffix(".tmp")
        torch.save({**state, "step": step, "seconds": seconds}, temporary)
        dist.barrier()
        temporary.replace(self.path)
        return True


def train_tower(model, heads: DenseHeads, corpus: Corpus, steps: int, work: Path, report, muon_lr=3e-3) -> None:
    """Stage 1: the tower learns what each cell shows."""
    tower = model.model.vision_tower
    optimizers = Optimizers([tower, heads], 1.5e-3, muon_lr)
    keeper = Keeper(work, "tower", {"tower": tower, "heads": heads, "optimizers": optimizers})
    first = keeper.load()
    for step in range(first, steps):
        rng = np.random.default_rng((7, dist.get_rank(), step))
        chosen = np.sort(rng.integers(0, len(corpus), TOWER_BATCH // 2 // dist.get_world_size()))
        pixel_values = to_pixel_values(np.concatenate([corpus.pixels[chosen], corpus.mosaic_pixels[chosen]]))
        cells = np.concatenate([corpus.cells[chosen], corpus.mosaic_cells[chosen]])
        cells = torch.from_numpy(cells.astype(np.int64))
        with autocast():
            loss, shares = heads(patch_features(model, pixel_values), cells, pixel_values)
        loss.backward()
        optimizers.step(rate(step / steps))
        report("tower", step, steps, loss.item(), " ".join(f"{100 * s:.0f}" for s in shares))
        keeper.save(step + 1, step + 1 == steps)


def question_loss(model, patches, rows, batches: Batches | None):
    """Cross-entropy at the answer positions, as mean per answer token; tells `batches` which types were right."""
    states = language_states(model, patches, rows.ids, rows.positions, rows.mask)
    chosen = rows.targets >= 0
    logits = model.lm_head(states[chosen]).float()
    targets = rows.targets[chosen]
    if batches is not None:
        words = targets != EOS_ID
        batches.update(rows.kinds[chosen][words], (logits.argmax(-1) == targets)[words])
    return F.cross_entropy(logits, targets)


def word_loss(model, patches: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of naming a cell's kind and hue by cosine of its projected token to the words' embeddings.

    Puts what a picture token shows where the word for it lies, so that a word can look its object up by likeness.
    Without it, objects were found by colour (100 %) but hardly by shape (63 % on `color of shape`).

    Args:
        model: the LLaVA.
        patches: (b, 64, 192) tower output.
        cells: (b, channels, 8, 8) dense targets in the order of CHANNELS.
    """
    front = cells[:, 0].flatten(1) > 0
    seen = F.normalize(model.model.multi_modal_projector(patches[front]).float(), dim=-1)
    loss = torch.zeros(())
    for channel, names in enumerate((KINDS, HUES)):
        number = torch.tensor([TOKENS.index(name) if name in TOKENS else -1 for name in names])
        classes = cells[:, channel].flatten(1)[front]
        known = number[classes] >= 0
        words = F.normalize(model.get_input_embeddings().weight[number.clamp(min=0)].float(), dim=-1)
        logits = WORD_SCALE * seen[known] @ words.T
        loss = loss + F.cross_entropy(logits.masked_fill(number < 0, -torch.inf), classes[known])
    return loss


class _Shares:
    def __init__(self, batches: Batches):
        self.batches = batches

    def state_dict(self) -> dict:
        return {"right": self.batches.right}

    def load_state_dict(self, state: dict) -> None:
        self.batches.right = state["right"]


def train_questions(model, heads: DenseHeads, corpus: Corpus, steps: int, work: Path, report, muon_lr=3e-3) -> None:
    """Stage 2: all weights on questions about general pictures, with text-only rows of all domains in between."""
    batches = Batches(corpus, seed=11 + dist.get_rank())
    size = dist.get_world_size()
    optimizers = Optimizers([model, heads], 1.5e-3, muon_lr)
    parts = {"model": model, "heads": heads, "optimizers": optimizers, "shares": _Shares(batches)}
    keeper = Keeper(work, "questions", parts)
    first = keeper.load()
    for step in range(first, steps):
        progress = step / steps
        rows = batches.image_rows(step, progress, QUESTION_BATCH // size, 8)
        pixel_values = to_pixel_values(corpus.pixels[rows.images])
        cells = torch.from_numpy(corpus.cells[rows.images].astype(np.int64))
        with autocast():
            patches = patch_features(model, pixel_values)
            loss = question_loss(model, patches, rows, batches)
            dense, _ = heads(patches, cells, pixel_values)
            words = word_loss(model, patches, cells)
            text = torch.zeros(())
            if progress < 0.1 or step % 3 == 0:
                text = question_loss(model, None, batches.text_rows(step, TEXT_BATCH // size), None)
        (loss + 0.15 * dense + 0.15 * words + 0.3 * text).backward()
        optimizers.step(rate(progress))
        report("questions", step, steps, loss.item(), f"words {words.item():.2f}; worst {batches.worst(6)}")
        if keeper.save(step + 1, step + 1 == steps) and (step + 1) % GATE_EVERY == 0:
            report.checkpoint(model, step + 1)
