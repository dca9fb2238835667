"""A share of `scripts/fuzz.py`: spoilt inputs are read, or refused in a sentence; the mutations reach every reader."""

from __future__ import annotations

import gzip
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = 470


@pytest.fixture
def mutations(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from fuzzing import mutations

    return mutations


def test_spoilt_inputs_leave_no_traceback_do_not_hang_and_do_not_fill_the_memory():
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-W", "ignore", str(ROOT / "scripts" / "fuzz.py"), str(CASES), "--seed", "11"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.rsplit(maxsplit=5) for line in done.stdout.splitlines()]
    assert rows[0][1:] == ["ok", "refused", "traceback", "hang", "memory"] and rows[-1][0] == "all"
    counts = [list(map(int, row[1:])) for row in rows[1:]]
    assert sum(counts[-1]) == CASES and counts[-1][2:] == [0, 0, 0] and min(counts[-1][:2]) > 30
    assert len(counts) > 60 and all(sum(row) >= 5 for row in counts)


def test_the_same_seed_makes_the_same_input_and_another_one_another(mutations):
    data = b'{"a": [1, {"b": "c"}], "d": null}'
    made = [mutations.mutated(random.Random(seed), "json", data) for seed in (1, 1, *range(200))]
    assert made[0] == made[1] and len(set(made)) > 100


@pytest.mark.parametrize(
    "kind", ["bytes", "json", "lines", "yaml", "picture", "words", "pickle", "header", "gzip", "tensors"]
)
def test_every_kind_of_input_is_changed(kind, mutations):
    import numpy as np
    from safetensors.numpy import save

    data = {"tensors": save({"a": np.ones(3)}), "yaml": b"a: 1\nb: {c: d}\n", "pickle": pickle.dumps({"a": [1, 2]})}
    data = {**data, "gzip": gzip.compress(b"a" * 99)}.get(kind, b'{"a": [1, 2]}')
    changed = [mutations.mutated(random.Random(seed), kind, data) != data for seed in range(100)]
    assert sum(changed) > 60
