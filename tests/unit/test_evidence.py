"""The README's table is what the stored results say, and they are of the shipped sweep."""

import json
import re
from pathlib import Path

import pytest

from mllm_keeplora.comparison import load_results
from mllm_keeplora.report.groups import group_runs, mean_and_sd
from mllm_keeplora.sweep_plan import final_cell, load_sweep, tune_cell

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence"
ROWS = {
    ("mini_dcl", "joint"): "joint training",
    ("mini_dcl", "finetune"): "sequential LoRA",
    ("mini_dcl", "keeplora"): "**KeepLoRA**",
    ("mini_dcl_variants", "keeplora"): "KeepLoRA (as above)",
    ("mini_dcl_variants", "anchored"): "**anchored KeepLoRA**",
    ("mini_dcl_variants", "keeplora_pp"): "KeepLoRA++ (scale 0.2 to 1 by depth)",
    ("mini_dcl_variants", "uniform_0.6"): "uniform scale 0.6 (control)",
    ("mini_dcl_variants", "no_weights"): "weights not protected",
    ("mini_dcl_variants", "no_features"): "features not protected",
    ("mini_dcl_variants", "random_A"): "random A in the free space",
}
COLUMNS = ("last", "average", "transfer", "bwt", "plasticity", "general_retention")


def numbers(cell: str) -> list[float]:
    return [float(number.replace("−", "-")) for number in re.findall(r"[−-]?\d+(?:\.\d+)?", cell)]


@pytest.mark.parametrize(("sweep", "strategy"), ROWS)
def test_the_readme_says_what_the_stored_runs_say(sweep, strategy):
    groups = {group.family: group for group in group_runs(load_results([EVIDENCE / sweep]))}
    named = f"| {ROWS[sweep, strategy]} |"
    row = next(line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith(named))
    cells = row.strip("|").split("|")[2:]
    for key, cell in zip(COLUMNS, cells, strict=False):
        factor = 100.0 if key == "general_retention" else 1.0
        mean, sd = mean_and_sd(groups[strategy].metric(key))
        told = numbers(cell)
        assert told == ([round(factor * mean, 1), round(factor * sd, 1)] if mean is not None else []), (key, row)


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EVIDENCE.glob("*/sweep.json")))
def test_stored_runs_are_those_of_the_shipped_sweep(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(name, [f"output=docs/evidence/{name}"])
    tuning = json.loads((EVIDENCE / name / "sweep.json").read_text("utf-8"))["tuning"]
    for label, record in tuning.items():
        for value in record["tried"]:
            assert tune_cell(sweep, label, float(value)).results() is not None, (label, value)
        for seed in sweep.final.seeds:
            assert final_cell(sweep, label, record["chosen"], seed).results() is not None, (label, seed)
