"""Every shipped benchmark, on a miniature in its published folders: check, run, eval, rescore, report."""

from __future__ import annotations

import json
import os

import pytest

from mllm_keeplora.config import load_config, shipped
from mllm_keeplora.data import load_benchmark
from mllm_keeplora.system import files
from tests.support.miniatures import MINIATURES, TEST

RUNS = {
    "mllm_dcl": "mllm_dcl_llava15",
    "ucit": "ucit_llava15",
    "mllm_acl": "mllm_acl_llava15_mcitlib",
    "coin": "coin_llava15",
}
NOT_GRADED = {"Math", "APP"}


def test_every_shipped_benchmark_has_a_miniature_here():
    with_classes = {"mtil", "mtil_coop", "mtil_xtail"}  # their published folders: tests/unit/data/test_layouts.py
    made_here = {"mini_dcl", "mini_mtil", "mini_mtil_cells"}
    of_clips = {"cl_vista"}  # tests/unit/data/test_vista.py
    assert {*MINIATURES, *with_classes, *made_here, *of_clips} == set(shipped("benchmarks"))


@pytest.mark.parametrize(
    # One goes the whole way each time; the others' readers and rules have tests of their own.
    "name",
    [name if name == "mllm_dcl" else pytest.param(name, marks=pytest.mark.slow) for name in MINIATURES],
)
def test_a_miniature_goes_through_everything(name, world, tmp_path, command):
    if name == "ucit":
        pytest.importorskip("pycocoevalcap", reason="caption scores need the extra `captions`")
    data, output = tmp_path / "data", tmp_path / "run"
    MINIATURES[name](data)
    # of the shipped run all but where data and base are; short answers and one process, since the base is a tiny one
    changed = [f"data_root={data}", f"base.model={world / 'base'}", f"output={output}"]
    changed += ["deepspeed=null", "eval.max_new_tokens=3", "threads=1", "diagnostics.samples=0"]

    said = command("check", RUNS[name], *changed)
    assert said.code == 0 and "no faults found" in said.out, said.err
    said = command("run", RUNS[name], *changed)
    assert said.code == 0, said.err

    results = json.loads((output / "results.json").read_text("utf-8"))
    benchmark = load_benchmark(load_config(RUNS[name], changed))
    assert results["domains"] == list(benchmark.domains) == benchmark.orders["official"]
    assert results["complete"] and results["questions"] == dict.fromkeys(benchmark.domains, TEST)
    for domain, score in zip(results["domains"], results["score_matrix"][-1], strict=True):
        assert (score is None) == (domain in NOT_GRADED), domain
        told = results["grading"][domain]
        assert told["scorer"] == benchmark.domains[domain].scorer and told["dtype"] == "float32"
    epochs = {each["name"]: each["train"]["epochs"] for each in files.read_json(output / "run.json")["domains"]}
    assert epochs == {domain: part.epochs for domain, part in benchmark.domains.items()}

    first = next(iter(benchmark.domains))
    said = command("eval", output, "--domains", first, "--exact")
    assert said.code == 0 and first in said.out, said.err
    said = command("rescore", output)
    assert said.code == 0 and "0 scores moved" in said.out, said.err
    said = command("report", output)
    assert said.code == 0 and (output / "report.html").is_file()
    for domain in NOT_GRADED & set(benchmark.domains):
        [lines] = output.glob(f"domains/04_*/predictions/{domain}.submit.jsonl")
        assert len(files.read_json_lines(lines)) == TEST


def test_the_data_folder_may_come_from_the_environment(world, tmp_path, command, monkeypatch):
    MINIATURES["mllm_dcl"](tmp_path)
    monkeypatch.setenv("MLLM_KEEPLORA_DATA", str(tmp_path))
    said = command("check", RUNS["mllm_dcl"], f"base.model={world / 'base'}", "deepspeed=null")
    assert said.code == 0, said.err
    monkeypatch.setenv("MLLM_KEEPLORA_DATA", os.devnull)
    said = command("check", RUNS["mllm_dcl"], f"base.model={world / 'base'}", "deepspeed=null")
    assert said.code == 2 and "RS/train.json does not exist" in said.err


def test_fin_questions_get_the_suffix_that_their_gold_answer_asks_for(tmp_path):
    MINIATURES["mllm_dcl"](tmp_path)
    benchmark = load_benchmark(load_config(RUNS["mllm_dcl"], [f"data_root={tmp_path}"]))
    fin = benchmark.domains["Fin"]
    suffixes = {record.answer: fin.suffix_for(record) for record in benchmark.test_records("Fin")}
    assert suffixes == {
        "Yes": " Only answer with yes or no directly.",
        "B": " Answer with the given letter directly, e.g., A, B, C, D.",
    }


def test_captions_are_matched_by_line_and_human_answers_by_question(tmp_path):
    MINIATURES["ucit"](tmp_path / "ucit")
    MINIATURES["coin"](tmp_path / "coin")
    captions = load_benchmark(load_config(RUNS["ucit"], [f"data_root={tmp_path / 'ucit'}"])).test_records("VizWiz")
    assert captions[0].answer == ("a red square on the left here", "a red square on the left in the picture")
    humans = load_benchmark(load_config(RUNS["coin"], [f"data_root={tmp_path / 'coin'}"])).test_records("TextVQA")
    assert len(humans[0].answer) == 10 and humans[0].answer.count("red") == 7
