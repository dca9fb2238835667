"""The training of `tiny-clip`: one loop that stops and continues at any step with the same weights."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tiny_llava.muon import Muon
from torch import Tensor, nn
from transformers import CLIPModel

from .corpus import SEED, Corpus
from .network import MOST_SCALE, similarities, symmetric_loss, views
from .processing import build_tokenizer

BATCH, CHECKPOINT_EVERY = 192, 50
RATE, MUON_RATE = 1e-3, 3e-3


def decay_from(steps: int) -> int:
    """Give the step from which the rate falls, and pictures are seen whole."""
    return steps * 13 // 20


def rate(step: int, steps: int, warmup: int = 100) -> float:
    """Give the share of the peak learning rate: a short rise, constant, then a straight fall to zero.

    What comes before the fall does not depend on `steps`, so a training may be cut short or drawn out until then.
    """
    return min(1.0, (step + 1) / warmup, (steps - step) / (steps - decay_from(steps)))


def optimizers_of(model: CLIPModel) -> list[tuple[torch.optim.Optimizer, float]]:
    """Pair Muon for the blocks' matrices, and AdamW for all else, with their peak rates."""
    named = list(model.named_parameters())
    hidden = [value for name, value in named if value.ndim == 2 and ".layers." in name]
    rest = [value for name, value in named if not (value.ndim == 2 and ".layers." in name)]
    # Without decay: words that captions never have would vanish.
    adam = torch.optim.AdamW(rest, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    return [(adam, RATE), (Muon(hidden, lr=MUON_RATE), MUON_RATE)]


def _loss(model: CLIPModel, tokenizer, corpus: Corpus, step: int, size: int, whole: bool) -> tuple[Tensor, float]:
    """Compute the loss of a step's batch, and the share of pictures whose text is the likeliest.

    Until the rate falls, every picture is seen through half of its patches: about as good a step in 0.6 of the time
    (Li et al., "Scaling Language-Image Pre-training via Masking", 2023).
    """
    chosen, texts = corpus.batch(step, size)
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    captions = [corpus.captions[place] for place in chosen]
    turns = torch.tensor([caption.turns for caption in captions])
    dark = torch.tensor([caption.origin == "digits" for caption in captions])
    pixels = views(torch.from_numpy(corpus.pixels[chosen]), turns, dark, generator)
    words = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    logits = similarities(model, pixels, words, None if whole else generator)
    right = [texts[place] == text for place, text in zip(logits.argmax(1).tolist(), texts, strict=True)]
    return symmetric_loss(logits, texts), sum(right) / len(right)


def train(
    model: CLIPModel, corpus: Corpus, steps: int, work: Path, report: Callable[..., None], size: int = BATCH
) -> float:
    """Train, or go on where `work` has a state.

    Args:
        model: with the weights that its seed gives.
        corpus: pictures and captions.
        steps: of the whole schedule; another number than before is refused once the rate falls.
        work: folder of the state, written every 50 steps; the one before the rate falls is kept beside it.
        report: called after each step with (step, steps, loss, share of right pictures, pictures a second).
        size: pictures of a batch.

    Returns:
        Seconds that all parts of the training took together.
    """
    path, tokenizer, optimizers = work / "state.pt", build_tokenizer(corpus.tokens), optimizers_of(model)
    first, seconds, started = 0, 0.0, time.monotonic()
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["steps"] != steps and state["step"] > min(decay_from(steps), decay_from(state["steps"])):
            raise ValueError(
                f"{path} is near the end of {state['steps']} steps, not of {steps}: delete it to start anew"
            )
        first, seconds = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for (optimizer, _), stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
    for step in range(first, steps):
        begun = time.monotonic()
        loss, right = _loss(model, tokenizer, corpus, step, size, step >= decay_from(steps))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MOST_SCALE)
        report(step, steps, loss.item(), right, size / (time.monotonic() - begun))
        falls = step + 1 == decay_from(steps)
        if (step + 1) % CHECKPOINT_EVERY == 0 or falls or step + 1 == steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                "step": step + 1,
                "steps": steps,
                "seconds": seconds + time.monotonic() - started,
            }
            torch.save(state, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
            if falls:  # whoever wants more steps than these goes on from here
                shutil.copy(path, work / "before_the_fall.pt")
    return seconds + time.monotonic() - started
