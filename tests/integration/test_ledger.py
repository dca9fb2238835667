"""What a run directory accepts when it is opened again: the same config, runtime changes, more domains, a parent."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from mllm_keeplora.config import parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.saved import evaluate, load_run
from mllm_keeplora.exports.card import model_card
from mllm_keeplora.runs import RunDir
from mllm_keeplora.sequence import run_sequence
from tests.integration.processes import artefacts, differing, results, run_in_child, stages

FIRST_LAYER = ("mllm_keeplora.linalg:principal_subspace", 1)


def run(values: dict, **options):
    return run_sequence(parse_config(values, origin="test"), **options)


def refusal(values: dict, **options) -> str:
    """The message with which a run is refused; its folder must hold the same bytes before and after."""
    before = _content(Path(values["output"]))
    with pytest.raises(UserError) as caught:
        run(values, **options)
    assert _content(Path(values["output"])) == before
    return str(caught.value)


def _content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def copy(two, tmp_path) -> Path:
    return shutil.copytree(two, tmp_path / "copy")


@pytest.fixture
def threads_restored():
    import torch

    yield
    torch.set_num_threads(1)


# -- one process at a time ---------------------------------------------------------------------------------------


def _hold(path: str, held, done) -> None:
    with RunDir(path).locked():
        held.set()
        done.wait(120)


def test_a_second_process_on_the_same_run_is_refused(settings, copy):
    context = multiprocessing.get_context("forkserver")
    held, done = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(copy), held, done))
    holder.start()
    try:
        assert held.wait(120)
        assert f"is in use by another process (pid {holder.pid})" in refusal(settings(copy))
        with pytest.raises(UserError, match=f"pid {holder.pid}"):
            evaluate(copy, domains=["Alpha"])
    finally:
        done.set()
        holder.join()
    run(settings(copy))  # free again


# -- the same config, or a refusal that shows the difference -----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"train": {"lr": 0.02}}, ["Alpha.train.lr: 0.03", "0.02 now", "Beta.train.lr"]),
        ({"train": {"args": {"adam_beta2": 0.9}}}, ["Alpha.train.args", "adam_beta2"]),
        ({"strategy": {"rank": 3, "grad_samples": 12, "feature_samples": 12}}, ["strategy.rank: 4", "3 now"]),
        ({"strategy": {"name": "finetune"}}, ["strategy"]),
        ({"seed": 7}, ["seed: 0", "7 now"]),
        ({"adapters": {"projector": "frozen"}}, ["adapters.projector: 'keeplora'", "'frozen' now"]),
        ({"eval": {"limit": 3}}, ["eval.limit: None", "3 now"]),
        ({"per_domain": {"Beta": {"train": {"epochs": 3}}}}, ["Beta.train.epochs: 2.0", "3.0 now"]),
        ({"domains": ("Beta", "Alpha")}, ["domains: ['Alpha', 'Beta']", "['Beta', 'Alpha'] now", "only be appended"]),
        ({"domains": ("Alpha",)}, ["['Alpha'] now", "only be appended"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_result_defining_config_is_refused_with_the_difference(changes, shown, settings, copy):
    values = settings(copy, **changes)
    if changes.get("strategy") == {"name": "finetune"}:
        values["strategy"] = {"name": "finetune", "rank": 4, "alpha": 8}
    message = refusal(values)
    assert f"run {copy} was started with another config" in message
    for part in shown:
        assert part in message


def test_another_scorer_of_a_domain_is_refused(settings, copy):
    values = settings(copy)
    values["benchmark"]["domains"]["Beta"]["scorer"] = "strict"
    assert "Beta.scorer: 'exact'" in refusal(values)


@pytest.fixture
def started(world, settings, tmp_path) -> dict:
    """Config of a run that was killed while it prepared, over a base and data of its own."""
    from tests.support.tiny import tiny_benchmark

    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copytree(world / "data", tmp_path / "data")
    values = settings(tmp_path / "run", benchmark=tiny_benchmark(tmp_path / "data"))
    values["base"] = {"model": str(tmp_path / "base")}
    assert run_in_child(values, kill=FIRST_LAYER) == -9
    assert stages(tmp_path / "run") == []
    return values


def test_other_base_weights_and_other_data_are_refused(started, world, tmp_path):
    shutil.copy(world / "other_base" / "model.safetensors", tmp_path / "base" / "model.safetensors")
    train = tmp_path / "data" / "Beta" / "train.json"
    train.write_text(json.dumps(json.loads(train.read_text())[:-1]))
    message = refusal(started)
    assert "the weights of the base model are not those that the run was started with" in message
    assert "Beta: its data files are not those that the run was started with" in message
    assert "Alpha" not in message


def test_a_state_whose_domain_is_unfinished_cannot_be_continued_elsewhere(started, tmp_path):
    values = {**started, "output": str(tmp_path / "next")}
    message = refusal(values, from_run=started["output"], after=1)
    assert "Alpha (--after 1) is not finished there" in message


def test_runtime_keys_may_change_and_are_noted(settings, two, copy, threads_restored):
    run(settings(copy, eval={"batch_size": 2}, threads=2, train={"log_steps": 5}))
    texts = [note["text"] for note in json.loads((copy / "run.json").read_text())["notes"]]
    assert "runtime key changed: eval.batch_size: 4 in before, 2 now" in texts
    assert "runtime key changed: threads: 1 in before, 2 now" in texts
    assert "runtime key changed: train.log_steps: 1 in before, 5 now" in texts
    assert differing(copy, two) == []


def test_data_may_move_if_its_content_stays(settings, world, two, copy, tmp_path):
    from tests.support.tiny import tiny_benchmark

    shutil.copytree(world / "data", tmp_path / "moved")
    run(settings(copy, benchmark=tiny_benchmark(tmp_path / "moved")))
    assert differing(copy, two) == []


# -- more domains ------------------------------------------------------------------------------------------------


def test_a_domain_appended_to_a_finished_run_gives_what_all_at_once_gives(settings, three, copy):
    run(settings(copy, ("Alpha", "Beta", "Gamma")))
    assert differing(copy, three) == []  # adapters of all domains, and the new cells of earlier rows
    assert "domains/00_base/predictions/Gamma.jsonl" in artefacts(copy)
    assert results(copy)["score_matrix"] == results(three)["score_matrix"]
    assert results(copy)["zero_shot"] == results(three)["zero_shot"]
    assert results(copy)["metrics"] == results(three)["metrics"]
    notes = json.loads((copy / "run.json").read_text())["notes"]
    assert any(note["text"] == "domain Gamma appended" for note in notes)


def test_a_run_continues_another_after_some_of_its_domains(settings, three, tmp_path):
    """Alpha is inherited, Beta and Gamma are learnt again: the same as learning all."""
    values = settings(tmp_path / "next", ("Alpha", "Beta", "Gamma"))
    run(values, from_run=three, after=1)
    assert differing(tmp_path / "next", three) == []
    assert results(tmp_path / "next")["score_matrix"] == results(three)["score_matrix"]
    record = json.loads((tmp_path / "next" / "run.json").read_text())
    assert record["parent"] == {"run": str(three), "after": 1}
    run(values)  # the same without --from goes on as well
    assert differing(tmp_path / "next", three) == []


def test_a_run_can_add_a_new_domain_to_another_without_naming_the_old_ones(settings, two, three, tmp_path):
    untouched = _content(two)
    run(settings(tmp_path / "next", ("Gamma",)), from_run=two, after=2)
    assert differing(tmp_path / "next", three) == []
    assert results(tmp_path / "next")["domains"] == ["Alpha", "Beta", "Gamma"]
    assert _content(two) == untouched


@pytest.mark.parametrize(
    ("domains", "after", "changes", "shown"),
    [
        (("Alpha", "Beta"), 3, {}, ["--after must be between 1 and 2", "got 3"]),
        (("Alpha", "Beta"), 0, {}, ["--after must be between 1 and 2", "got 0"]),
        (("Beta", "Gamma"), 2, {}, ["['Beta', 'Gamma']", "['Alpha', 'Beta']"]),
        (("Gamma",), 2, {"adapters": {"projector": "full"}}, ["adapters.projector: 'keeplora'", "'full' now"]),
        (("Gamma",), 2, {"base": {"model": "other_base"}}, ["its base model is not other_base as it is now"]),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    domains, after, changes, shown, settings, two, world, tmp_path, monkeypatch
):
    monkeypatch.chdir(world)
    values = {**settings(tmp_path / "next", domains), **changes}
    message = refusal(values, from_run=two, after=after)
    for part in shown:
        assert part in message


def test_joint_training_neither_continues_a_run_nor_takes_more_domains(settings, joint, two, tmp_path):
    values = settings(tmp_path / "next", ("Gamma",))
    values["strategy"] = {"name": "joint", "rank": 4, "alpha": 8}
    assert "joint learns all domains at once" in refusal(values, from_run=two, after=2)

    copied = shutil.copytree(joint, tmp_path / "copy")
    values = settings(copied, ("Alpha", "Beta", "Gamma"))
    values["strategy"] = {"name": "joint", "rank": 4, "alpha": 8}
    assert "none can be appended" in refusal(values)


def test_a_run_that_stands_on_its_own_is_not_continued_from_a_parent(settings, three, copy):
    assert f"was not started from {three}" in refusal(settings(copy), from_run=three, after=1)


def test_a_folder_that_is_no_run_is_no_parent(settings, world, tmp_path):
    message = refusal(settings(tmp_path / "next"), from_run=world / "data", after=1)
    assert "is not a run directory" in message


# -- strategies and settings of one domain -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint(settings, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "joint"
    values = settings(output)
    values["strategy"] = {"name": "joint", "rank": 4, "alpha": 8}
    assert run_in_child(values) == 0
    return output


def test_the_card_of_an_exported_joint_run_has_the_scores_of_every_domain(joint):
    card = model_card(load_run(joint), 1, "weights", "transformers")
    assert all(f"| {name} |" in card for name in ("Alpha", "Beta", "general"))


def test_joint_training_is_one_unit_and_fills_the_last_row(joint):
    record = json.loads((joint / "run.json").read_text())
    assert [unit["domains"] for unit in record["units"]] == [["Alpha", "Beta"]]
    first, last = results(joint)["score_matrix"]
    assert first == [None, None]
    assert all(isinstance(cell, float) for cell in last)
    assert record["stages"]["01_joint/train"]["steps"] == 12  # each record as often as in the sequence
    assert [path.name for path in sorted((joint / "domains").iterdir())] == ["00_base", "01_joint"]


def test_sequential_finetuning_trains_both_factors_and_keeps_nothing(settings, tmp_path):
    from safetensors.torch import load_file

    values = settings(tmp_path / "run")
    values["strategy"] = {"name": "finetune", "rank": 4, "alpha": 8}
    assert run_in_child(values) == 0
    for unit in ("01_Alpha", "02_Beta"):
        folder = tmp_path / "run" / "domains" / unit
        start = load_file(folder / "init.safetensors")
        end = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert len(start) == 16 and len(end) == 32  # two layers x seven linears, and the projector's two
        for name, A in start.items():
            layer = name.removesuffix(".A")
            assert not A.equal(end[f"base_model.model.{layer}.lora_A.weight"])
            assert end[f"base_model.model.{layer}.lora_B.weight"].abs().max() > 0
        assert load_file(folder / "basis.safetensors") == {}


def test_one_domain_can_have_training_settings_of_its_own(settings, two, tmp_path):
    values = settings(tmp_path / "run", per_domain={"Beta": {"train": {"epochs": 1, "lr": 0.02}}})
    assert run_in_child(values) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["stages"]["01_Alpha/train"]["steps"] == 6
    assert record["stages"]["02_Beta/train"]["steps"] == 3
    changed = differing(tmp_path / "run", two)
    assert changed and all(name.startswith("domains/02_Beta/") for name in changed)
