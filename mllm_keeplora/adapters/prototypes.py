"""Prototypes: a vector for each class, which pictures are compared with beside the classes' texts (KeepLoRA+).

A module's prototypes belong to one list of classes, by its digest, and have its order. Knows no records and no texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mllm_keeplora.adapters.factors import PrototypeFacts
from mllm_keeplora.errors import UserError, shortened
from mllm_keeplora.models.partition import copy_of
from mllm_keeplora.system import files

SCALE = 30.0


class Prototypes(nn.Module):
    """Add to the logits of a dual base how near pictures are to their classes' prototypes.

    Args:
        P: (C, d), where the prototypes start; they train.
        classes: digest of the list of classes that they are for.
        scale: of their logits.

    Source: the published code of KeepLoRA+ for CLIP (its cosine classifier).
    """

    def __init__(self, P: Tensor, classes: str, scale: float = SCALE):
        super().__init__()
        self.P, self.classes, self.scale = nn.Parameter(P.detach().float().clone()), classes, scale

    def logits(self, features: Tensor) -> Tensor:
        """Give scale * cos(f, P), (n, C) float32, of image features f (n, d) of any length, whatever the autocast."""
        with torch.autocast(features.device.type, enabled=False):  # P may be bfloat16 under DeepSpeed
            return self.scale * (normalize(features.float()) @ normalize(self.P.float()).mT)

    forward = logits

    def save(self, path: Path) -> None:
        """Write a safetensors file that says which list the prototypes are for."""
        files.write_tensors(path, {"P": copy_of(self.P).float()}, {"prototypes": json.dumps(self.facts())})

    def facts(self) -> PrototypeFacts:
        """Say which list the prototypes are for, and their scale."""
        return {"classes": self.classes, "scale": self.scale}

    @classmethod
    def load(cls, path: Path) -> Prototypes:
        """Read what `save` wrote; a UserError names a file that is missing or damaged."""
        tensors, facts = files.read_tensors(path), files.read_facts(path, "prototypes", PrototypeFacts)
        if "P" not in tensors or tensors["P"].ndim != 2:
            raise UserError(f"{path} is damaged: it holds no prototypes")
        return cls(tensors["P"], **facts)


class ClassMeans:
    """Average the unit-length features of pictures by class, over batches and processes.

    Args:
        classes, width: C and d.

    Attributes:
        sums, counts: (C, d) and (C,) float64, to be summed over processes.
    """

    def __init__(self, classes: int, width: int, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(classes, width, dtype=torch.float64, device=device)
        self.counts = torch.zeros(classes, dtype=torch.float64, device=device)

    def update(self, features: Tensor, places: Tensor) -> None:
        """Take in image features (n, d) of any length, and which class each picture shows, (n,)."""
        rows = normalize(features.detach().double())
        self.sums.index_add_(0, places, rows)
        self.counts.index_add_(0, places, rows.new_ones(len(rows)))

    def prototypes(self, names: Sequence[str], classes: str, scale: float = SCALE) -> Prototypes:
        """Begin prototypes at the means, which get unit length.

        Args:
            names: of the classes.
            classes, scale: as of `Prototypes`.

        Raises:
            UserError: some class has no picture.
        """
        missing = [name for name, count in zip(names, self.counts.tolist(), strict=True) if not count]
        if missing:
            raise UserError(
                f"strategy.prototypes is cosine, but no training record shows {len(missing)} of {len(names)} classes, "
                f"first {shortened(repr(missing[0]))}; allowed: null, or a record of every class"
            )
        return Prototypes(normalize(self.sums / self.counts[:, None]), classes, scale)
