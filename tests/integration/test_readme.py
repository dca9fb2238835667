"""The examples of README and documentation are run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mllm_keeplora.config import parse_config
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.strategies import STRATEGIES
from mllm_keeplora.system import files

ROOT = Path(__file__).parents[2]


def first_script(page: str, heading: str) -> str:
    """The first block of commands below a heading."""
    section = (ROOT / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)[0]


def names_of_code(page: str) -> dict:
    """What a page's blocks of Python define."""
    found: dict = {}
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(code, found)
    return found


def test_the_strategy_that_the_page_writes_learns_what_sequential_lora_does(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(STRATEGIES, "written", names_of_code("docs/writing-a-strategy.md")["Sequential"])
    for name in ("written", "finetune"):
        values = settings(tmp_path / name, ("Alpha",), diagnostics={"samples": 0})
        run_sequence(parse_config({**values, "strategy": {"name": name, "rank": 4, "alpha": 8}}, origin="test"))
    one, two = (
        files.read_tensors(tmp_path / name / "domains/01_Alpha/adapter/adapter_model.safetensors")
        for name in ("written", "finetune")
    )
    assert one.keys() == two.keys() and all(tensor.equal(two[key]) for key, tensor in one.items())


def test_the_scoring_rule_that_the_page_writes_grades():
    [rule] = names_of_code("docs/plugins.md")["SCORERS"].values()
    assert [rule("b) a car", "B"), rule("A", "B")] == [1.0, 0.0]


@pytest.mark.slow
def test_own_data_examples_learn_their_domain(tmp_path):
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    configs = []
    for script in (first_script("docs/data.md", "An example from nothing"), first_script("README.md", "Your own data")):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        configs.append((tmp_path / "my_run.yaml").read_text())
    assert configs[0] == configs[1], "the README's run is the one that the page's data is drawn for"
    results = json.loads((tmp_path / "runs/lamps/results.json").read_text())
    assert results["domains"] == ["Lamps"]
    assert results["metrics"]["last"] > results["blind"][0] + 20
    assert (tmp_path / "runs/lamps/report.html").stat().st_size > 10_000
