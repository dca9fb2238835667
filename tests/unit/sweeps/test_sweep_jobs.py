"""A sweep on several devices and in parts: who runs where, what is chosen, what a part does and refuses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from mllm_keeplora.cli.sweep import sweep
from mllm_keeplora.errors import UserError
from mllm_keeplora.sweeps import cells
from mllm_keeplora.sweeps import jobs as sweep_jobs
from mllm_keeplora.sweeps.cells import Cell, Runner, visible_devices
from mllm_keeplora.sweeps.jobs import run_part, slurm_script
from mllm_keeplora.sweeps.plan import load_sweep
from mllm_keeplora.sweeps.sweep import run_sweep, tune

SCORES = {1e-3: 50.0, 2e-3: 60.0, 4e-3: 70.0, 8e-3: 65.0}  # Last of the tuning runs, by learning rate


@pytest.fixture
def write(tmp_path):
    def build(**changes):
        values = {
            "name": "small",
            "run": "mini_dcl",
            "strategies": {"finetune": ["strategy.name=finetune"], "keeplora": []},
            "tune": {"grid": [1e-3, 2e-3, 4e-3]},
            "final": {"seeds": [1, 2]},
            "output": str(tmp_path / "out"),
        }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return load_sweep(path)

    return build


@dataclass(frozen=True)
class Process:
    wait: Callable[[], int]


class Machine:
    """Stands for the processes of runs: they take a moment, end with `code`, and leave a score."""

    def __init__(self):
        self.started: list[str] = []
        self.devices: list[str | None] = []
        self.busy: list[str | None] = []
        self.most = 0
        self.done: dict[Path, None] = {}  # in the order in which they ended
        self.code = 0
        self.failing: tuple[str, ...] = ()  # beginnings of names of runs that end with 1 and leave no score
        self.seconds = lambda folder: 0.0
        self.lock = threading.Lock()

    def popen(self, command, env, **_):
        folder = Path(next(word for word in command if word.startswith("output=")).removeprefix("output="))
        device = env.get("CUDA_VISIBLE_DEVICES")
        with self.lock:
            self.started.append(folder.name)
            self.devices.append(device)
            assert device is None or device not in self.busy, f"two runs at a time on device {device}"
            self.busy.append(device)
            self.most = max(self.most, len(self.busy))

        def wait():
            time.sleep(self.seconds(folder))
            with self.lock:
                self.busy.remove(device)
                if folder.name.startswith(self.failing or ("-",)):
                    return 1
                self.done[folder] = None
            return self.code

        return Process(wait)

    def results(self, cell: Cell):
        if cell.folder not in self.done:
            return None
        metrics = {"last": SCORES[cell.config().train.lr], "bwt": None}
        return SimpleNamespace(metrics=metrics, to_dict=lambda: cell.folder.name)


@pytest.fixture
def machine(monkeypatch):
    """The machine that every run goes to; without GPUs, and with nothing to check."""
    machine = Machine()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(cells, "subprocess", SimpleNamespace(Popen=machine.popen, STDOUT=None))
    monkeypatch.setattr(Cell, "results", lambda cell: machine.results(cell))
    monkeypatch.setattr(sweep_jobs, "check_sweep", lambda sweep: None)
    monkeypatch.setattr(sweep_jobs, "visible_devices", lambda: [])
    return machine


# -- devices ---------------------------------------------------------------------------------------------------------


def test_as_many_runs_at_a_time_as_devices_and_each_sees_one(machine, write):
    machine.seconds = lambda folder: 0.05
    tune(write(), Runner(devices=["3", "GPU-7"]))
    assert len(machine.started) == 6 + 2  # the grid of both strategies, then 8e-3, beyond the best, of each
    assert set(machine.devices) == {"3", "GPU-7"} and machine.most == 2


def test_without_devices_runs_follow_one_another_unless_told_otherwise(machine, write):
    machine.seconds = lambda folder: 0.02
    tune(write(), Runner())
    assert machine.most == 1 and set(machine.devices) == {None}
    machine.done.clear()
    tune(write(), Runner(3))
    assert machine.most == 3 and set(machine.devices) == {None}


def test_more_runs_than_devices_share_them():
    runner = Runner(3, ["0", "1"])
    places = [runner.places.get_nowait()["CUDA_VISIBLE_DEVICES"] for _ in range(3)]
    assert places == ["0", "1", "0"] and runner.places.empty()


@pytest.mark.parametrize(
    ("named", "count", "devices"),
    [
        (None, 0, []),
        (None, 2, ["0", "1"]),
        ("3,5", 2, ["3", "5"]),
        ("GPU-a, GPU-b", 2, ["GPU-a", "GPU-b"]),
        ("", 0, []),
        ("0", 0, []),
    ],
)
def test_visible_devices_are_those_that_the_environment_leaves(monkeypatch, named, count, devices):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_devices() == devices


def test_the_choice_does_not_depend_on_the_order_in_which_runs_end(machine, write):
    chosen, orders = [], []
    for first_is_slow in (False, True):
        machine.done.clear()
        names = [f"{label}-{value:g}" for label in ("finetune", "keeplora") for value in SCORES]
        if first_is_slow:
            names.reverse()
        machine.seconds = lambda folder, names=names: 0.03 * names.index(folder.name)
        tunings = tune(write(), Runner(6))
        orders.append([folder.name for folder in machine.done])
        chosen.append({label: (tuning.best, tuning.scores) for label, tuning in tunings.items()})
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert chosen[0] == chosen[1]
    assert chosen[0]["keeplora"] == (4e-3, SCORES)


def test_a_run_that_a_signal_stopped_stops_the_sweep_to_be_continued(machine, write):
    machine.code = 75
    with pytest.raises(KeyboardInterrupt):
        tune(write(), Runner())
    assert machine.started == ["finetune-0.001"]


@pytest.fixture
def reported(machine, monkeypatch):
    """What the comparison at the end is given: (results, chosen values, notes), of each time it is written."""
    written = []
    monkeypatch.setattr("mllm_keeplora.sweeps.sweep.check_sweep", lambda sweep: None)
    monkeypatch.setattr("mllm_keeplora.sweeps.sweep.visible_devices", lambda: [])
    monkeypatch.setattr(
        "mllm_keeplora.sweeps.sweep.write_comparison",
        lambda folder, title, results, choice: (
            folder.mkdir(exist_ok=True),
            written.append((results, choice.values, choice.notes)),
        ),
    )
    return written


def test_a_strategy_of_which_every_run_fails_holds_up_no_other(machine, write, reported):
    machine.failing = ("finetune-",)
    with pytest.raises(UserError, match=r"no setting of finetune gave a result; see .*; the comparison of the others"):
        run_sweep(write())
    [(results, values, notes)] = reported
    assert results == ["keeplora-0.004-seed1", "keeplora-0.004-seed2"] and values == {"keeplora": 4e-3}
    assert any(note.startswith("Not in here: no setting of finetune") for note in notes)
    machine.failing = ()
    assert len(run_sweep(write())) == 4 and len(reported[1][0]) == 4


def test_final_runs_go_seed_by_seed(machine, write, reported):
    run_sweep(write())
    finals = [name for name in machine.started if "seed" in name]
    assert finals == [f"{label}-0.004-seed{seed}" for seed in (1, 2) for label in ("finetune", "keeplora")]


def test_a_final_run_that_fails_is_left_out_of_the_comparison_and_told(machine, write, reported):
    machine.failing = ("keeplora-0.004-seed2",)
    with pytest.raises(UserError, match=r"^keeplora-0\.004-seed2 failed; see .*The same command tries again"):
        run_sweep(write())
    [(results, values, notes)] = reported
    assert len(results) == 3 and len(values) == 2
    assert any("Not in here: keeplora-0.004-seed2 failed" in note for note in notes)


def test_a_sweep_without_any_result_says_so_and_compares_nothing(machine, write, reported):
    machine.code = 2
    machine.failing = ("finetune", "keeplora")
    with pytest.raises(UserError, match=r"no run gave a result; see .*/tune/\*\.log"):
        run_sweep(write())
    assert reported == []


# -- parts -----------------------------------------------------------------------------------------------------------


def test_parts_of_the_grid_are_its_runs_one_by_one(machine, write):
    small = write()
    for number in range(1, 7):
        run_part(small, f"tune:{number}/6")
    values = ("0.001", "0.002", "0.004")
    assert machine.started == [f"{label}-{value}" for label in ("finetune", "keeplora") for value in values]


def test_a_part_that_is_done_ends_at_once(machine, write, monkeypatch):
    small = write()
    run_part(small, "tune:2/6")
    monkeypatch.setattr(sweep_jobs, "check_sweep", lambda sweep: pytest.fail("there is nothing to check"))
    assert run_part(small, "tune:2/6") == [f"{small.folder}/tune/finetune-0.002 is done"]
    assert machine.started == ["finetune-0.002"]


def test_final_parts_run_what_the_tuning_chose(machine, write):
    small = write()
    with pytest.raises(UserError, match="has not chosen yet"):
        run_part(small, "final:1/4")
    run_part(small, "tune:1/6")
    said = run_part(small, "tune")
    assert said == [f"{label}: chose train.lr 0.004" for label in ("finetune", "keeplora")]
    assert len(machine.started) == 8, "the part that was done is not done again; both grids went on to 8e-3"
    for number in range(1, 5):
        run_part(small, f"final:{number}/4")
    assert machine.started[8:] == [f"{label}-0.004-seed{seed}" for seed in (1, 2) for label in ("finetune", "keeplora")]


def test_further_parts_try_one_value_beyond_the_edge_a_round(machine, write):
    small = write(tune={"grid": [1e-3, 2e-3]})
    for number in range(1, 5):
        run_part(small, f"tune:{number}/4")
    for expected in (["finetune-0.004", "keeplora-0.004"], ["finetune-0.008", "keeplora-0.008"], []):
        before = len(machine.started)
        said = [run_part(small, f"further:{number}/2") for number in (1, 2)]
        assert machine.started[before:] == expected
    assert said == [["further:1/2: nothing further to try"], ["further:2/2: nothing further to try"]]
    run_part(small, "tune")
    assert len(machine.started) == 8, "the choice has nothing left to run"


def test_a_further_part_that_failed_is_tried_again_in_the_next_round(machine, write):
    small = write(tune={"grid": [1e-3, 2e-3]})
    run_part(small, "tune:1/4"), run_part(small, "tune:2/4")
    machine.failing = ("finetune-0.004",)
    with pytest.raises(UserError, match="failed"):
        run_part(small, "further:1/2")
    machine.failing = ()
    assert run_part(small, "further:1/2") == [f"{small.folder}/tune/finetune-0.004 is done"]


def test_a_choice_without_one_strategy_serves_the_others(machine, write):
    small = write()
    machine.failing = ("finetune-",)
    said = run_part(small, "tune")
    assert said[0] == "keeplora: chose train.lr 0.004" and said[1].startswith("no setting of finetune gave a result")
    run_part(small, "final:2/4")
    assert machine.started[-1] == "keeplora-0.004-seed1"
    with pytest.raises(UserError, match="no setting of finetune gave a result"):
        run_part(small, "final:3/4")


def test_a_choice_among_other_settings_is_refused_and_more_seeds_are_not(machine, write):
    run_part(write(), "tune")
    run_part(write(final={"seeds": [1, 2, 3]}), "final:6/6")
    assert machine.started[-1] == "keeplora-0.004-seed3"
    with pytest.raises(UserError, match="among other settings"):
        run_part(write(tune={"grid": [1e-3, 2e-3]}), "final:1/4")


def test_a_part_that_fails_names_its_log(machine, write):
    machine.code = 1
    with pytest.raises(UserError, match=r"failed; see .*finetune-0\.001\.log"):
        run_part(write(), "tune:1/6")


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("tune:1/4", "has 6 such runs now"),
        ("tune:7/6", "no run 7 of 6"),
        ("tune:0/6", "tune:K/N"),
        ("final", "tune:K/N"),
        ("tune:1", "tune:K/N"),
        ("further:1/3", "has 2 such runs now"),
    ],
)
def test_a_wrong_part_is_told(machine, write, part, told):
    with pytest.raises(UserError, match=told):
        run_part(write(), part)
    assert machine.started == []


def test_the_slurm_script_has_a_task_for_every_run_and_quotes_its_words(write):
    text = slurm_script(write(), ["/my env/python", "-m", "mllm_keeplora", "sweep", "it's.yaml"], Path("/my runs"))
    assert "name=small num_tune=6 num_further=2 num_final=4 rounds=3\n" in text
    assert "folder='/my runs'\n" in text
    assert """command=('/my env/python' -m mllm_keeplora sweep 'it'"'"'s.yaml')\n""" in text


def test_the_command_writes_the_slurm_script_and_runs_nothing(machine, write, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("mllm_keeplora.sweeps.sweep.check_sweep", lambda sweep: None)
    write()
    path = tmp_path / "a sweep.sh"
    sweep(str(tmp_path / "small.yaml"), ["tune.seed=3"], slurm=path)
    assert f" sweep {tmp_path}/small.yaml tune.seed=3)" in path.read_text()
    assert f"bash '{path}'" in capsys.readouterr().out and machine.started == []
    for also in ({"only": "tune"}, {"jobs": 2}):
        with pytest.raises(UserError, match="neither --only nor --jobs"):
            sweep(str(tmp_path / "small.yaml"), slurm=path, **also)


def test_the_command_does_the_part_that_it_is_told(machine, write, tmp_path, capsys):
    write()
    sweep(str(tmp_path / "small.yaml"), only="tune:2/6")
    assert machine.started == ["finetune-0.002"] and "finetune-0.002 is done" in capsys.readouterr().out
