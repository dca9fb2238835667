"""A second kind of base, as small as can be: two linear towers and a cosine, which name a picture's best answer."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

from mllm_keeplora.data.media.images import images_of
from mllm_keeplora.data.schema import Record, Turn
from mllm_keeplora.models import Base
from mllm_keeplora.models.family import Answer
from mllm_keeplora.models.running import removed_afterwards

WORDS, SIDE, WIDTH = 24, 4, 16


class Towers(nn.Module):
    """Logits (1, b, candidates): how near what is seen (with its question) is to what each candidate says."""

    def __init__(self):
        super().__init__()
        self.see = nn.Linear(3 * SIDE * SIDE + WORDS, WIDTH, bias=False)
        self.read = nn.Linear(WORDS, WIDTH, bias=False)

    def forward(self, pixel_values, candidates):
        seen, said = torch.tanh(self.see(pixel_values)), torch.tanh(self.read(candidates))
        return SimpleNamespace(logits=8 * cosine_similarity(seen[:, None], said[None], dim=-1)[None])


@dataclass(frozen=True)
class ToyParts:
    target_layers: tuple[str, ...] = ("see", "read")
    projectors: tuple[str, ...] = ()

    def tower(self, layer):
        return layer

    def depth(self, layer):
        return self.target_layers.index(layer)


@dataclass(frozen=True)
class ToyFamily:
    """A `Family` whose labels are places among the candidates."""

    names: tuple[str, ...]

    def training_batch(self, records, max_length=None):
        asked = [record.question_answers()[0] for record in records]
        batch = self._batch(records, [question for question, _ in asked])
        places = [self.names.index(answer) if answer in self.names else 0 for _, answer in asked]
        return {**batch, "labels": torch.tensor(places)}

    def example(self):
        return self.training_batch([Record("a text", (), (Turn("user", "?"), Turn("assistant", "!")))])

    def question_batch(self, records, suffixes=None):
        return self._batch(records, [record.question for record in records])

    def joined(self, first, second):
        return {key: first[key] if key == "candidates" else torch.cat([first[key], second[key]]) for key in first}

    def length(self, record):
        return 0

    def token_kinds(self, model, batch, pictures=False):
        return {"record": torch.ones(len(batch["pixel_values"]), dtype=torch.bool)}

    @contextmanager
    def passing(self, model, gradients=False):
        def start(module, args):
            return (args[0].detach().requires_grad_(True),)

        towers = [module for name, module in model.named_modules() if name.split(".")[-1] in ("see", "read")]
        with removed_afterwards([each.register_forward_pre_hook(start) for each in towers] if gradients else []):
            yield

    def supervised(self, model, batch):
        return nullcontext()

    def asking(self, ensemble):
        return nullcontext()

    def sees_pictures(self, layer):
        return False

    def losses(self, logits, labels):
        return cross_entropy(logits[0], labels, reduction="none"), torch.arange(len(labels))

    def answers(self, model, batch, limit, keep_rows):
        return [Answer(self.names[place], False) for place in model(**batch).logits[0].argmax(dim=1).tolist()]

    def _batch(self, records, questions):
        rows = []
        for record, question in zip(records, questions, strict=True):
            pictures = [each.convert("RGB").resize((SIDE, SIDE)) for each in images_of(record, (0, 0, 0))]
            seen = np.asarray(pictures[0], dtype=np.float32).ravel() / 128 - 1 if pictures else np.zeros(3 * SIDE**2)
            rows.append(torch.cat([torch.tensor(seen, dtype=torch.float32), bag(question)]))
        return {"pixel_values": torch.stack(rows), "candidates": torch.stack([bag(name) for name in self.names])}


def bag(text: str) -> torch.Tensor:
    """Counts of a text's words, each in a place that its letters give."""
    counts = torch.zeros(WORDS)
    for word in text.split():
        counts[sum(map(ord, word)) % WORDS] += 1
    return counts


def toy_base(names: tuple[str, ...], seed: int = 0) -> Base:
    torch.manual_seed(seed)
    model = Towers().requires_grad_(False).eval()
    return Base("toy", model, None, ToyFamily(names), ToyParts(), f"toy{seed}")
