"""Every stage seeds itself from seed, domain and stage, so that a resumed run repeats an uninterrupted one."""

from __future__ import annotations

import hashlib


def stage_seed(seed: int, *parts: object) -> int:
    """Make a 31-bit seed of the run's seed and the names of unit and stage."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
