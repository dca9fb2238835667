"""A uniform sample of records that were seen once, kept as references. Knows numbers only, no record and no file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Reservoir:
    """A sample of at most `capacity` references, in which all that were offered have the same chance.

    Args:
        capacity: N, references held at most; at least 1.

    Source: Vitter (1985), Algorithm R: the n-th reference is taken if n <= N, else it takes the place of a random one
    with probability N / n.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.seen = 0
        self.references: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.references)

    def offer(self, domain: int, count: int, rng: torch.Generator) -> None:
        """Offer every record of a domain once, in random order.

        Args:
            domain: its 0-based place in the sequence.
            count: its records, numbered from 0.
            rng: on the CPU; of the order and of the places taken.
        """
        import torch

        for number in torch.randperm(count, generator=rng).tolist():
            self.seen += 1
            if self.seen <= self.capacity:
                self.references.append((domain, number))
                continue
            slot = int(torch.randint(self.seen, (), generator=rng))
            if slot < self.capacity:
                self.references[slot] = (domain, number)

    def state(self) -> Tensor:
        """Give (1 + n, 2) int64: capacity and how many were seen, then domain and number of each reference."""
        import torch

        return torch.tensor([(self.capacity, self.seen), *self.references], dtype=torch.int64)

    def load(self, state: Tensor) -> None:
        """Take back what `state` gave."""
        (capacity, self.seen), *references = map(tuple, state.tolist())
        assert capacity == self.capacity, f"a reservoir of {capacity} does not fit into one of {self.capacity}"
        self.references = references
