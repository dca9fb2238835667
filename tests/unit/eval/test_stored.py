"""Files that a run keeps, spoilt: what is wrong is told by file and key before anything is made of it."""

from __future__ import annotations

import json

import pytest

from mllm_keeplora.adapters.factors import Branch, Factors
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.grading import stored_figures, stored_rows
from mllm_keeplora.eval.results import Results
from mllm_keeplora.runs import RunDir

ROW = {"id": "a", "question": "?", "answer": "red", "prediction": "red", "score": 1.0}
LEDGER = {
    "format": 1, "name": "x", "created": "", "environment": {}, "benchmark": "b", "seed": 0,
    "base": {"name": "b", "fingerprint": None}, "parent": None, "config": {}, "domains": [], "units": [], "suites": [],
}  # fmt: skip
RESULTS = {
    "benchmark": "b", "domains": ["A", "B"], "strategy": "s", "base": "b", "seed": 0, "format": 1,
    "score_matrix": [[1.0, None], [1.0, 2.0]], "zero_shot": [1.0, None], "blind": [None, None],
    "general": {"g": [1.0, 2.0, 3.0]}, "metrics": {"last": 1.5}, "wall_seconds": {"train": 1.0}, "peak_memory_bytes": 1,
}  # fmt: skip


def test_results_are_read_as_they_were_written(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    results = Results.load(tmp_path / "results.json")
    results.save(tmp_path / "again.json")
    assert {**json.loads((tmp_path / "again.json").read_text()), **RESULTS} == results.to_dict()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"domains": 3}, "domains: input should be"),
        ({"metrics": {"last": "high"}}, r"metrics\.last"),
        ({"metrics": [["last", 1]]}, "metrics: "),
        ({"wall_seconds": {"train": float("inf")}}, "not finite"),
        ({"score_matrix": [[1.0, 2.0]]}, "score_matrix has 1 rows for 2 domains"),
        ({"score_matrix": [[1.0], [1.0]]}, "score_matrix has 1 scores for 2 domains"),
        ({"zero_shot": []}, "zero_shot has 0 scores"),
        ({"general": {"g": [1.0] * 4}}, "general.g has 4 scores"),
        ({"domains": [], "score_matrix": []}, "score_matrix has 0 rows for 0 domains"),
        ({"grading": {"A": {"prompt_suffix": 3}}}, r"grading\.A\.prompt_suffix"),
        ({"seed": None}, "seed: "),
        ({"format": [1] * 9999}, "has format .*this version reads 1"),
    ],
)
def test_spoilt_results_are_told_by_their_key(changes, told, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({**RESULTS, **changes}))
    with pytest.raises(UserError, match=told) as caught:
        Results.load(tmp_path / "results.json")
    assert "results.json" in str(caught.value) and len(str(caught.value)) < 1500


@pytest.mark.parametrize("key", RESULTS)
def test_results_without_a_key_are_refused(key, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({name: each for name, each in RESULTS.items() if name != key}))
    with pytest.raises(UserError, match=key):
        Results.load(tmp_path / "results.json")


@pytest.mark.parametrize(
    "row", [[], 3, {**ROW, "score": "1"}, {**ROW, "answer": 3}, {**ROW, "prediction": None}, {"id": "a"}]
)
def test_a_spoilt_row_of_predictions_is_told_by_its_number_and_key(row, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(row) + "\n")
    if row == {**ROW, "score": "1"}:  # pydantic reads a number in quotes
        assert stored_rows(tmp_path / "a.jsonl")[1]["score"] == 1.0
        return
    with pytest.raises(UserError, match=r"1[.:].*a\.jsonl"):
        stored_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize("text", [b"\xff\xfe\n", b"{\n", b"[" * 9000 + b"\n", b'{"id": "\\ud800"}\n', b"\0\n"])
def test_predictions_that_are_no_json_lines_are_damaged(text, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(text)
    with pytest.raises(UserError, match=r"a.jsonl is damaged"):
        stored_rows(tmp_path / "a.jsonl")


def test_spoilt_figures_are_told(tmp_path):
    (tmp_path / "a.figures.json").write_text(json.dumps({"percent": "high"}))
    with pytest.raises(UserError, match="percent"):
        stored_figures(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"units": [{"index": 1, "name": "../../x", "domains": []}]}, r"units\.0\.name"),
        ({"domains": [{"name": "a/b", "files": {}, "sha256": {}}]}, r"domains\.0\.name"),
        ({"domains": [{"name": "a", "files": {}, "sha256": {}, "train": []}]}, r"domains\.0\.train"),
        ({"suites": [{"name": "x" * 101, "files": {}, "sha256": {}}]}, r"suites\.0\.name"),
        ({"stages": {"a": {"seconds": "long", "peak_memory_bytes": 1}}}, r"stages\.a\.seconds"),
        ({"format": "1" * 9999}, "has format"),
    ],
)
def test_a_spoilt_ledger_is_told_by_its_key_and_leads_nowhere_else(changes, told, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({**LEDGER, **changes}))
    with pytest.raises(UserError, match=told) as caught:
        RunDir(tmp_path).load()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("text", ["[]", "null", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", ""])
def test_a_ledger_that_holds_no_keys_is_damaged(text, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json"):
        RunDir(tmp_path).load()


@pytest.mark.parametrize("change", ["config", "pattern", "tensor", "shape"])
def test_a_spoilt_adapter_is_told_by_its_file(change, tmp_path):
    import torch

    Factors({"a": torch.ones(2, 3)}, {"a": torch.ones(4, 2)}, {"a": 4.0}).save(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    if change == "config":
        settings = [settings]
    if change == "pattern":
        settings["alpha_pattern"] = {"a": "much"}
    if change == "tensor":
        settings["alpha_pattern"] = {"b": 4.0}
    if change == "shape":
        Factors({"a": torch.ones(2, 3)}, {"a": torch.ones(4, 5)}, {"a": 4.0}).save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"adapter_(config\.json|model\.safetensors)"):
        Factors.load(tmp_path)


def test_a_spoilt_branch_is_told_by_its_file(tmp_path):
    import torch

    from mllm_keeplora.system import files

    path = tmp_path / "a.safetensors"
    for facts in ("[", "[]", '{"alpha": {"b": 1.0}, "train": ["B"]}', '{"alpha": {}, "train": ["C"]}',
                  '{"alpha": {}, "train": ["B"], "mixer": {"kind": "x"}}'):  # fmt: skip
        files.write_tensors(path, {"a": torch.ones(1)}, {"branch": facts})
        with pytest.raises(UserError, match=r"a\.safetensors"):
            Branch.load(path)
    files.write_tensors(path, {"a": torch.ones(1)})
    with pytest.raises(UserError, match=r"a\.safetensors"):
        Branch.load(path)
