"""The commands of a person at a terminal, from `run` to Ctrl-C."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from tests.integration.processes import command_in_child, differing, interrupted, leftovers, results, stages

COMMANDS = ("run", "eval", "report", "check", "list")


@pytest.fixture
def copy(two, settings, tmp_path):
    """A finished run of which a test may change something; its YAML is beside it."""
    run = shutil.copytree(two, tmp_path / "copy")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(run)))
    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_has_an_example(name, command):
    said = command(name, "--help")
    assert said.code == 0
    assert f"Example: mllm-keeplora {name} " in said.out


def test_help_names_every_command(command):
    said = command("--help")
    assert said.code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in said.out


def test_run_prints_one_table_and_where_the_results_are(copy, command):
    said = command("run", copy.parent / "run.yaml")
    assert said.code == 0, said.err
    for part in ("zero-shot", "blind", "after Alpha", "after Beta", "general", "Last", "Average", "Transfer", "BWT"):
        assert part in said.out
    assert f"results  {copy}/results.json" in said.out
    assert f"report   {copy}/report.html" in said.out
    assert (copy / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_check_counts_records_and_writes_nothing(settings, tmp_path, command):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(tmp_path / "out")))
    said = command("check", tmp_path / "run.yaml")
    assert said.code == 0, said.err
    assert "Alpha        12 train records (12 with pictures), 8 test records (8 with pictures)" in said.out
    assert "general      8 test records" in said.out
    assert said.out.endswith("no faults found\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_report_writes_again_what_was_deleted(copy, command):
    before = (copy / "results.json").read_bytes()
    (copy / "results.json").unlink()
    (copy / "report.html").unlink()
    said = command("report", copy)
    assert said.code == 0, said.err
    assert "after Beta" in said.out
    assert (copy / "results.json").read_bytes() == before
    assert (copy / "report.html").is_file()


def test_eval_after_an_earlier_domain_gives_the_same_answers_again(copy, two, command):
    path = copy / "domains" / "01_Alpha" / "predictions" / "Beta.jsonl"
    path.unlink()
    said = command("eval", copy, "--after", "1", "--domains", "Beta")
    assert said.code == 0, said.err
    assert said.out == f"{'Beta':<12} {results(two)['score_matrix'][0][1]:6.2f}\n"
    assert differing(copy, two) == []


def test_eval_of_the_base_and_of_everything(copy, two, command):
    assert command("eval", copy, "--after", "0", "--domains", "Alpha, general").code == 0
    said = command("eval", copy, "--batch-size", "4")
    assert [line.split()[0] for line in said.out.splitlines()] == ["Alpha", "Beta", "general"]
    assert differing(copy, two) == []


def test_eval_asks_the_questions_of_a_file(copy, world, command):
    rows = json.loads((world / "data" / "Beta" / "test.json").read_text())[:3]
    suite = world / "data" / "Beta" / "three.json"
    suite.write_text(json.dumps(rows))
    said = command("eval", copy, "--suite", suite)
    assert said.code == 0, said.err
    assert said.out.startswith("three ")
    answered = (copy / "domains" / "02_Beta" / "predictions" / "three.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in answered] == [row["question_id"] for row in rows]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("strategies", ["finetune", "joint", "keeplora"]),
        ("models", ["tiny-llava"]),
        ("benchmarks", ["mini_dcl"]),
        ("runs", ["mini_dcl"]),
    ],
)
def test_list_names_what_a_config_can_say(kind, names, command):
    said = command("list", kind)
    assert said.code == 0
    listed = [line.split()[0] for line in said.out.splitlines()]
    assert set(names) <= set(listed)
    if kind == "strategies":
        assert all(len(line.split()) > 3 for line in said.out.splitlines()), "each with a sentence"


def test_ctrl_c_exits_with_130_and_the_same_command_continues(settings, two, tmp_path):
    output = tmp_path / "run"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(output)))
    step = ("mllm_keeplora.training.fit:Reporter.on_step_end", 4)
    said = command_in_child("run", tmp_path / "run.yaml", kill=step, act=interrupted)
    assert said.code == 130, said.err
    assert said.err.rstrip().endswith("stopped; the same command continues the run")
    assert "Traceback" not in said.err
    assert stages(output)[-1] == "01_Alpha/gradient"

    said = command_in_child("run", tmp_path / "run.yaml")
    assert said.code == 0, said.err
    assert "after Beta" in said.out
    assert differing(output, two) == []
    assert leftovers(output) == []
