"""A base that writes learns classes from published folders, and is graded by the names it writes."""

from __future__ import annotations

import json

import pytest
import yaml

from mllm_keeplora.system import files
from tests.support.mtil_trees import write_mtil
from tests.support.tiny import tiny_config


@pytest.mark.slow
def test_a_writing_base_learns_published_sets_of_classes(world, tmp_path, command):
    values = tiny_config(world / "base", tmp_path, tmp_path / "out", data_root=str(tmp_path), shots=2)
    values |= {"benchmark": write_mtil(tmp_path, ["DTD", "MNIST"]), "domains": ["MNIST", "DTD"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    said = command("run", tmp_path / "run.yaml")
    assert said.code == 0, said.err
    results = json.loads((tmp_path / "out/results.json").read_text("utf-8"))
    assert results["complete"] and results["questions"] == {"MNIST": 20, "DTD": 6}
    [path] = (tmp_path / "out").glob("domains/*_DTD/predictions/MNIST.jsonl")
    row = files.read_json_lines(path)[0]
    assert (row["question"], row["answer"]) == ("Which class is shown?", "0 - zero")
    said = command("rescore", tmp_path / "out")
    assert said.code == 0 and "0 scores moved" in said.out, said.err
    said = command("run", tmp_path / "run.yaml", "benchmark.domains.DTD.prompts=['a {}.']")
    assert said.code == 2 and "DTD: its classes, prompts or question are not those" in said.err
