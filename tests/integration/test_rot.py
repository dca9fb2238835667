"""Rot in a run directory is noticed by whoever reads it, told by file, and can be gone back from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mllm_keeplora.config import parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.saved import evaluate, load_run
from mllm_keeplora.exports.checkpoint import export
from mllm_keeplora.report.page import refresh_results
from mllm_keeplora.runs import RunDir, stage_of
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.system import proofs
from tests.integration.processes import command_in_child, differing, results, run_in_child, stages

ADAPTER = "domains/01_Alpha/adapter/adapter_model.safetensors"
ANSWERS = "domains/02_Beta/predictions/Beta.jsonl"


@pytest.fixture
def copy(two, tmp_path) -> Path:
    return shutil.copytree(two, tmp_path / "copy")


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file; size and time stay as they were, as in real rot."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


# -- every artefact has a digest, and each one counts ------------------------------------------------------------------


def test_every_artefact_is_known_with_its_digest(two):
    ledger = json.loads((two / "run.json").read_text())
    known = ledger["artefacts"]
    assert {name: proofs.digest(two / name) for name in known} == known
    others = {"run.json", "run.copy.json", "log.txt", "metrics.jsonl", ".lock"}
    assert sorted({*known, *others}) == files_of(two)
    assert {stage_of(name) for name in known} - {"report", "opening"} <= {*ledger["stages"]}


def test_a_flipped_bit_in_any_artefact_is_found_by_verify_and_by_nothing_else(two, copy, command):
    said = command("inspect", copy, "--verify")
    assert (
        said.code == 0 and f"{len(RunDir(two).load().ledger.artefacts)} files are what the run has written" in said.out
    )
    for name in RunDir(copy).load().ledger.artefacts:
        flip(copy / name)
        said = command("inspect", copy, "--verify")
        assert said.code == 1 and said.out.splitlines()[0].startswith(f"{copy / name} is not what the run has written")
        assert said.out.count("\n") == 1, said.out
        shutil.copy(two / name, copy / name)


@pytest.mark.parametrize(
    ("name", "reads"),
    {
        ADAPTER: ["export", "eval", "run"],
        "domains/01_Alpha/adapter/adapter_config.json": ["export", "eval"],
        "domains/02_Beta/manifest.json": ["export", "eval"],
        "domains/01_Alpha/basis.safetensors": ["extend"],
        "prepare/basis.safetensors": ["extend"],
        ANSWERS: ["report"],
        "domains/02_Beta/predictions/Beta.figures.json": ["report"],
        "domains/02_Beta/gradient.json": ["report"],
        "domains/01_Alpha/diagnostics.json": ["report"],
    }.items(),
)
def test_whoever_reads_a_damaged_file_names_it_and_says_where_to_go_back(copy, settings, tmp_path, name, reads):
    flip(copy / name)
    calls = {
        "export": lambda: export(copy, "adapter", tmp_path / "exported"),
        "eval": lambda: evaluate(copy, domains=["Beta"]),
        "report": lambda: refresh_results(load_run(copy)),
        "extend": lambda: run_sequence(parse_config(settings(copy, ("Alpha", "Beta", "Gamma")), origin="test")),
        "run": lambda: run_sequence(parse_config(settings(copy, ("Alpha", "Beta", "Gamma")), origin="test")),
    }
    before = {path: (copy / path).read_bytes() for path in files_of(copy) if "predictions" in path}
    for reader in reads:
        told = refusal(calls[reader])
        assert told.startswith(f"{copy / name} is "), reader  # damaged, or not what the run has written
        assert f"--redo {stage_of(name)}`" in told
        assert {path: (copy / path).read_bytes() for path in before} == before, "nothing is overwritten"
        assert not (tmp_path / "exported").exists()


def graded_otherwise(line: str) -> str:
    return line.replace("0.0", "1.0") if "0.0" in line else line.replace("1.0", "0.0")


@pytest.mark.parametrize("edit", ["lost", "doubled", "edited"])
def test_a_line_of_answers_that_is_lost_doubled_or_edited_moves_no_score(copy, edit):
    lines = (copy / ANSWERS).read_text().splitlines(keepends=True)
    lines = {"lost": lines[1:], "doubled": [lines[0], *lines], "edited": [graded_otherwise(lines[0]), *lines[1:]]}
    (copy / ANSWERS).write_text("".join(lines[edit]))
    assert "--redo 02_Beta/evaluate/Beta` makes it again" in refusal(refresh_results, load_run(copy))


def test_answers_that_were_edited_are_graded_as_they_are_but_not_in_silence(copy):
    rows = [json.loads(line) for line in (copy / ANSWERS).read_text().splitlines()]
    rows[0]["prediction"] = "neither" if rows[0]["score"] else rows[0]["answer"]
    (copy / ANSWERS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = command_in_child("rescore", copy)
    assert said.code == 0 and "is not what the run has written" in " ".join(said.err.split())
    assert RunDir(copy).load().faults() == []


def test_results_that_rotted_are_not_compared_and_report_makes_them_again(two, copy, command):
    flip(copy / "results.json")
    said = command("compare", copy, two)
    assert said.code == 2 and f"`report {copy}` makes it again" in said.err
    assert command("report", copy).code == 0
    assert results(copy)["score_matrix"] == results(two)["score_matrix"]
    assert command("inspect", copy, "--verify").code == 0


def test_a_lost_basis_is_not_nothing_to_keep(copy, settings):
    (copy / "prepare/basis.safetensors").unlink()
    told = refusal(run_sequence, parse_config(settings(copy, ("Alpha", "Beta", "Gamma")), origin="test"))
    assert told.startswith(f"{copy}/prepare/basis.safetensors is missing") and "--redo prepare" in told


def test_half_a_config_is_not_filled_up_by_defaults(copy):
    path = copy / "config.yaml"
    whole = path.read_text()
    path.write_text("".join(line for line in whole.splitlines(keepends=True) if "grad_samples" not in line))
    told = refusal(load_run, copy)
    assert "is not the run's config any more" in told and "strategy.grad_samples: 12 in" in told


# -- going back --------------------------------------------------------------------------------------------------------


def test_after_going_back_to_a_stage_the_run_ends_as_if_nothing_had_rotted(two, copy, settings):
    flip(copy / ADAPTER)
    kept = json.loads((copy / "run.json").read_text())["stages"]
    assert run_in_child(settings(copy), redo="01_Alpha/train") == 0
    assert not differing(two, copy) and results(copy)["score_matrix"] == results(two)["score_matrix"]
    now = json.loads((copy / "run.json").read_text())
    same = [stage for stage, entry in now["stages"].items() if kept[stage] == entry]
    assert same == ["prepare", "00_base/evaluate/Alpha", "00_base/evaluate/Beta", "00_base/evaluate/general",
                    "01_Alpha/gradient"]  # fmt: skip
    assert "gone back to 01_Alpha/train" in now["notes"][-1]["text"]
    assert RunDir(copy).load().faults() == []


def test_answers_alone_are_asked_again(two, copy, settings):
    flip(copy / ANSWERS)
    before = json.loads((copy / "run.json").read_text())["stages"]
    assert run_in_child(settings(copy), redo="02_Beta/evaluate/Beta") == 0
    after = json.loads((copy / "run.json").read_text())["stages"]
    assert [stage for stage in before if before[stage] != after[stage]] == ["02_Beta/evaluate/Beta"]
    assert not differing(two, copy)


def test_a_killed_going_back_goes_on(two, copy, settings):
    kill = ("mllm_keeplora.training.fit:Reporter.on_step_end", 3)
    assert run_in_child(settings(copy), kill=kill, redo="01_Alpha") < 0
    assert "01_Alpha/gradient" in stages(copy) and "01_Alpha/train" not in stages(copy)
    assert run_in_child(settings(copy)) == 0
    assert not differing(two, copy)


@pytest.mark.parametrize("stage", ["03_Gamma/train", "train", "02_Beta/evaluate/Gamma", "report"])
def test_only_a_stage_that_is_done_can_be_gone_back_to(copy, settings, stage):
    told = refusal(lambda: run_sequence(parse_config(settings(copy), origin="test"), redo=stage))
    assert told.startswith(f"--redo {stage}: {copy} has not done that; done are 00_base/evaluate/Alpha")


def test_there_is_nothing_to_go_back_to_in_a_new_run(settings, tmp_path):
    told = refusal(lambda: run_sequence(parse_config(settings(tmp_path / "new"), origin="test"), redo="prepare"))
    assert told == f"--redo prepare: there is no run in {tmp_path / 'new'} yet"
    assert not (tmp_path / "new").exists()


def test_a_run_is_not_started_from_what_has_rotted(two, copy, settings, tmp_path):
    flip(copy / ADAPTER)
    config = parse_config(settings(tmp_path / "child", ("Alpha", "Gamma")), origin="test")
    told = refusal(lambda: run_sequence(config, from_run=copy, after=1))
    assert told.startswith(f"{copy / ADAPTER} is not what") and not (tmp_path / "child/run.json").exists()
    assert run_in_child(settings(tmp_path / "child", ("Alpha", "Gamma")), from_run=two, after=1) == 0
    child = RunDir(tmp_path / "child").load()
    assert child.faults() == [] and child.ledger.artefacts[ADAPTER] == RunDir(two).load().ledger.artefacts[ADAPTER]
    told = refusal(lambda: run_sequence(config, redo="01_Alpha/train"))
    assert told == f"--redo 01_Alpha/train: it was inherited from {two}; go back there"


# -- the ledger itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "lost", "empty"])
def test_a_damaged_ledger_is_made_again_from_its_copy(two, copy, settings, command, damage):
    ledger = copy / "run.json"
    content = ledger.read_bytes()
    ledger.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    if damage == "lost":
        ledger.unlink()
    said = command("report", copy)
    assert said.code == 2 and f"`inspect {copy} --rebuild` makes it again from its copy" in said.err
    assert command("inspect", copy, "--rebuild").code == 0
    assert stages(copy) == stages(two)
    assert run_in_child(settings(copy)) == 0 and not differing(two, copy)


def test_a_rebuilt_ledger_says_which_artefacts_do_not_prove_themselves(copy, command):
    (copy / "run.json").write_text("{")
    flip(copy / ADAPTER)
    said = command("inspect", copy, "--rebuild")
    assert said.code == 1 and said.out.startswith(f"{copy / ADAPTER} is not what the run has written")


def test_without_a_whole_copy_the_ledger_cannot_be_made_again(copy, command):
    (copy / "run.json").write_text("{")
    flip(copy / "run.copy.json")
    said = command("inspect", copy, "--rebuild")
    assert (
        said.code == 2
        and "run.copy.json" in said.err
        and "is damaged" in said.err
        and (copy / "run.json").read_text() == "{"
    )


def test_a_flipped_digit_in_the_ledger_is_told(copy):
    text = (copy / "run.json").read_text()
    (copy / "run.json").write_text(text.replace('"seed": 0', '"seed": 1', 1))
    assert text != (copy / "run.json").read_text()
    said = command_in_child("inspect", copy, "--verify")
    told = " ".join(said.err.split())
    assert said.code == 1 and "was changed since the run wrote it, or is damaged" in told and "/run.json" in told


def test_a_run_of_an_older_version_is_given_digests_once(two, copy, settings, command):
    entered = json.loads((copy / "run.json").read_text())
    (copy / "run.copy.json").unlink()
    (copy / "run.json").write_text(json.dumps({k: v for k, v in entered.items() if k not in ("artefacts", "sha256")}))
    assert "has no digests" in command("inspect", copy, "--verify").out
    assert run_in_child(settings(copy)) == 0 and run_in_child(settings(copy)) == 0
    now = json.loads((copy / "run.json").read_text())
    known = json.loads((two / "run.json").read_text())["artefacts"]
    mine = {"results.json", "report.html", "config.yaml"}
    assert {k: v for k, v in now["artefacts"].items() if k not in mine} == {
        k: v for k, v in known.items() if k not in mine
    }
    assert [note["text"].split(" of ")[0] for note in now["notes"]].count("digests") == 1
