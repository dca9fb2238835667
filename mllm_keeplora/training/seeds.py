"""Every stage seeds itself from seed, domain and stage, so that a resumed run repeats an uninterrupted one."""

from __future__ import annotations

import hashlib


def stage_seed(seed: int, *parts: object) -> int:
    """A 31-bit seed from the run's seed and the names of unit and stage."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch on all devices."""
    from transformers import set_seed

    set_seed(seed)
