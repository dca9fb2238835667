"""A mixer of branches that weighs as it is told."""

import torch

from mllm_keeplora.adapters.mixers.mixing import Mixer


class Given(Mixer):
    """Weights as they are given: the first rows of a table for the rows of a batch."""

    kind = "given"

    def __init__(self, parts: int, rows: int = 0, shares: int | None = None):
        super().__init__()
        self.shares, self.parts, self.rows = shares, parts, rows
        self.table = torch.nn.Parameter(torch.ones((rows, parts) if rows else parts))

    def settings(self):
        return {"parts": self.parts, "rows": self.rows, "shares": self.shares}

    def weigh(self, batch, model):
        return self.table[: len(batch["input_ids"])] if self.rows else self.table
