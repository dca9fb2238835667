"""The scripts that start runs on several processes, nodes and SLURM jobs; SLURM's own commands are stubs here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from mllm_keeplora.sweeps.jobs import slurm_script
from mllm_keeplora.sweeps.plan import load_sweep
from tests.integration.processes import results

ROOT = Path(__file__).parents[2]
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
LAUNCHERS = ("run_sequence.sh", "eval_only.sh", "launch.sh", "run_multinode.sh", "run_slurm.sbatch")


def bash(*words: object, **changes: str) -> subprocess.CompletedProcess:
    """Run a script by bash, with this Python's environment and one thread for each process."""
    environment = {**os.environ, "VENV": sys.prefix, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.run(["bash", *map(str, words)], env=environment, capture_output=True, text=True, timeout=900)


# -- processes of this machine ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(settings, tmp_path_factory) -> Path:
    """A folder with spaces in its name: a copy of `scripts`, `run.yaml`, and the run that two processes made of it."""
    folder = tmp_path_factory.mktemp("many processes")
    shutil.copytree(ROOT / "scripts", folder / "the scripts", ignore=shutil.ignore_patterns("tiny_llava", "bench"))
    shorter = {"train": {"epochs": 1}, "strategy": {"grad_samples": 4, "feature_samples": 4}}
    config = settings(folder / "unused", ("Alpha",), diagnostics={"samples": 0}, **shorter)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    done = bash(folder / "the scripts/run_sequence.sh", folder / "run.yaml", 2, f"output={folder / 'the run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report   ") == 1, "the main process alone prints"
    return folder


@pytest.mark.slow
def test_run_sequence_runs_on_as_many_processes_as_it_is_told(launched):
    assert "= 2 processes x 2" in (launched / "the run/log.txt").read_text()
    assert results(launched / "the run")["metrics"]["last"] is not None
    assert (launched / "the run/report.html").is_file()


@pytest.mark.slow  # both scripts start `launch.sh`, and `eval` in two processes is held by test_two_processes
def test_eval_only_asks_a_saved_run_with_two_processes(launched):
    done = bash(launched / "the scripts/eval_only.sh", launched / "the run", 2, "--after", 1, "--domains", "Alpha")
    assert done.returncode == 0, done.stderr[-3000:]
    name, percent = done.stdout.split()
    assert name == "Alpha"
    assert float(percent) == pytest.approx(results(launched / "the run")["metrics"]["last"], abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_run_multinode_meets_at_the_head_and_continues_the_run(launched, nodes):
    before = json.loads((launched / "the run/run.json").read_text())["stages"]
    overrides = [f"output={launched / 'the run'}", f"threads={nodes + 1}"]
    words = [launched / "run.yaml", nodes, f"127.0.0.1:{_free_port()}", 1, *overrides]
    with ThreadPoolExecutor(nodes) as pool:  # launches on one machine stand for nodes
        ended = list(pool.map(lambda _: bash(launched / "the scripts/run_multinode.sh", *words), range(nodes)))
    assert [done.returncode for done in ended] == [0] * nodes, ended[0].stderr[-3000:]
    assert sum(done.stdout.count("report   ") for done in ended) == 1, "one process of all prints"
    record = json.loads((launched / "the run/run.json").read_text())
    assert record["stages"] == before
    told = record["notes"][-1]["text"]
    assert "threads: " in told and f"{nodes + 1} now" in told, "the overrides reach the run"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_single_process_needs_no_launcher_and_keeps_the_exit_code(tmp_path):
    for script, words in (("run_sequence.sh", ["nowhere.yaml", "1"]), ("eval_only.sh", [tmp_path, "1"])):
        done = bash(ROOT / "scripts" / script, *words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "torch" not in done.stderr


@pytest.mark.parametrize("words", [["run.yaml"], ["run.yaml", "two", "node1"]])
def test_run_multinode_names_what_it_needs(words):
    done = bash(ROOT / "scripts/run_multinode.sh", *words)
    assert done.returncode == 2 and "NODES" in done.stderr


# -- the launcher ----------------------------------------------------------------------------------------------------

WORKER = """
import os, signal, sys, time
folder, code = sys.argv[1], int(sys.argv[2])
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
with open(f"{folder}/{os.environ['RANK']}.tmp", "w") as file:
    file.write(os.environ["OMP_NUM_THREADS"] + " " + os.environ.get("DS_ACCELERATOR", ""))
os.rename(file.name, file.name[:-4])
time.sleep(60 if code == 0 else 0)
sys.exit(code)
"""


@pytest.fixture
def launcher(tmp_path):
    """Function (code) -> a launch of two workers that end with that code, or wait if it is 0."""
    (tmp_path / "worker.py").write_text(WORKER)
    started = []

    def start(code: int) -> subprocess.Popen:
        words = ["--standalone", "--nproc_per_node", "2", tmp_path / "worker.py", tmp_path, code]
        environment = {key: os.environ[key] for key in os.environ if key not in ("OMP_NUM_THREADS", "DS_ACCELERATOR")}
        command = [sys.executable, "-m", "mllm_keeplora.system.launch", *map(str, words)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        return started[-1]

    yield start
    for process in started:
        process.kill()


def test_a_launch_ends_with_the_code_of_its_workers(launcher, tmp_path):
    assert launcher(3).wait(60) == 3
    import torch

    threads, accelerator = (tmp_path / "0").read_text().split(" ")
    assert 1 <= int(threads) <= max(1, (os.cpu_count() or 1) // 2)
    assert accelerator == ("" if torch.cuda.is_available() else "cpu")


def test_a_launch_passes_sigusr1_on_to_its_workers(launcher, tmp_path):
    process = launcher(0)
    _wait_for(tmp_path / "0", tmp_path / "1")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75


def _wait_for(*paths: Path) -> None:
    until = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, f"{paths} did not appear"
        time.sleep(0.02)


# -- SLURM -----------------------------------------------------------------------------------------------------------

STUBS = {
    "srun": """printf '%s\\n' "$@" > "$TOLD/srun"
while [[ "$1" == --* ]]; do [[ "$1" == *=* ]] || shift; shift; done
exec "$@"
""",
    "scontrol": """case "$1 $2" in
    "show hostnames") printf 'node1\\nnode2\\n' ;;
    "show job") echo "   JobState=$STATE Reason=None" ;;
    *) echo "$*" >> "$TOLD/scontrol" ;;
esac
""",
    "sbatch": """printf '%s\\n' "$@" "" >> "$TOLD/sbatch"
echo x >> "$TOLD/count"
echo "$(wc -l < "$TOLD/count");cluster"
""",
    "python": """printf '%s\\n' "$@" > "$TOLD/python"
[[ -n "${WAITS:-}" ]] || exit "$CODE"
trap 'exit "$CODE"' USR1 TERM
touch "$TOLD/ready"
while true; do sleep 0.05; done
""",
}


@pytest.fixture
def slurm(tmp_path):
    """A folder with spaces that holds stubs of SLURM and of Python (`bin`), and what they were told."""
    folder = tmp_path / "a cluster"
    (folder / "bin").mkdir(parents=True)
    for name, text in STUBS.items():
        (folder / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (folder / "bin" / name).chmod(0o755)
    return folder


def _job(slurm: Path, words: list[object], **changes: str) -> subprocess.Popen:
    """Start a job's script as SLURM would."""
    environment = {
        **os.environ,
        "PATH": f"{slurm / 'bin'}:{os.environ['PATH']}",
        "VENV": str(slurm),
        "TOLD": str(slurm),
        "STATE": "RUNNING",
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "64",
        **changes,
    }
    return subprocess.Popen(["bash", *map(str, words)], env=environment, stderr=subprocess.PIPE, text=True)


def _told(slurm: Path, name: str) -> list[str]:
    path = slurm / name
    return path.read_text().splitlines() if path.exists() else []


SBATCH = ROOT / "scripts/run_slurm.sbatch"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_a_slurm_job_starts_one_launcher_a_node_and_keeps_the_exit_code(slurm, code):
    job = _job(slurm, [SBATCH, "my run.yaml", "output=my runs/one"], CODE=str(code))
    assert job.wait(20) == code
    assert _told(slurm, "scontrol") == []
    step, program = " ".join(_told(slurm, "srun")), _told(slurm, "python")
    assert "--nodes 2 --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 --cpus-per-task 64" in step
    assert " ".join(program[:8]) == "-m mllm_keeplora.system.launch --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d"
    assert program[8:12] == ["--rdzv_endpoint", "node1:20123", "--rdzv_id", "123-0"]
    assert program[12:] == ["-m", "mllm_keeplora", "run", "my run.yaml", "output=my runs/one"]


@pytest.mark.parametrize(
    ("number", "state", "code", "requeued"),
    [
        (signal.SIGUSR1, "RUNNING", 75, True),
        (signal.SIGTERM, "RUNNING", 75, True),
        (signal.SIGUSR1, "COMPLETING", 75, True),  # its time ran out while it stopped
        (signal.SIGTERM, "COMPLETING", 75, False),  # it was cancelled
        (signal.SIGUSR1, "RUNNING", 1, True),
        (signal.SIGUSR1, "RUNNING", 2, False),
        (signal.SIGUSR1, "RUNNING", 0, False),  # it was done just then
    ],
)
def test_a_slurm_job_that_is_stopped_queues_again(slurm, number, state, code, requeued):
    job = _job(slurm, [SBATCH, "run.yaml"], CODE=str(code), STATE=state, WAITS="yes")
    _wait_for(slurm / "ready")
    job.send_signal(number)
    assert job.wait(20) == code
    assert _told(slurm, "scontrol") == (["requeue 123"] if requeued else [])


def test_a_program_that_was_stopped_without_the_script_queues_again(slurm):
    assert _job(slurm, [SBATCH, "run.yaml"], CODE="75").wait(20) == 75
    assert _told(slurm, "scontrol") == ["requeue 123"]


@pytest.fixture
def sweep_script(slurm, write_sweep) -> Path:
    """The SLURM script of a sweep of two strategies, two values and three seeds."""
    sweep = load_sweep(write_sweep(slurm))
    path = slurm / "my sweep.sh"
    path.write_text(slurm_script(sweep, [str(slurm / "bin/python"), "-m", "mllm_keeplora", "sweep", "s.yaml"], slurm))
    return path


@pytest.fixture
def write_sweep():
    def build(folder: Path) -> Path:
        values = {
            "name": "small",
            "run": "mini_dcl",
            "strategies": {"finetune": ["strategy.name=finetune"], "keeplora": []},
            "tune": {"grid": [1e-3, 2e-3], "extensions": 2},
            "final": {"seeds": [1, 2, 3]},
            "output": str(folder / "out"),
        }
        (folder / "s.yaml").write_text(yaml.safe_dump(values))
        return folder / "s.yaml"

    return build


def test_a_sweep_is_submitted_as_jobs_that_wait_for_each_other(slurm, sweep_script):
    job = _job(slurm, [sweep_script, "--gpus", "1", "--comment=two words"], SLURM_JOB_ID="")
    assert job.wait(20) == 0
    jobs = [each.split("\n") for each in "\n".join(_told(slurm, "sbatch")).strip().split("\n\n")]
    assert [each[-1] for each in jobs] == ["tune", "further", "further", "choose", "final", "compare"]
    assert all(each[-3:-1] == [str(sweep_script), "--part"] and "--comment=two words" in each for each in jobs)
    arrays = [[word for word in each if word.startswith(("--array", "--dependency"))] for each in jobs]
    assert arrays[0] == ["--array=1-4"]
    assert arrays[1:3] == [["--array=1-2", "--dependency=afterany:1"], ["--array=1-2", "--dependency=afterany:2"]]
    assert arrays[3] == ["--dependency=afterany:3"]
    assert arrays[4] == ["--array=1-6", "--dependency=afterok:4"]
    assert arrays[5] == ["--dependency=afterany:5"]


def test_a_refused_submission_ends_the_chain(slurm, sweep_script):
    (slurm / "bin/sbatch").write_text('#!/usr/bin/env bash\necho no >> "$TOLD/sbatch"; exit 1\n')
    assert _job(slurm, [sweep_script]).wait(20) == 1
    assert _told(slurm, "sbatch") == ["no"]


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("tune", ["--only", "tune:3/4"]),
        ("further", ["--only", "further:3/2"]),
        ("choose", ["--only", "tune"]),
        ("final", ["--only", "final:3/6"]),
        ("compare", []),
    ],
)
def test_a_job_of_a_sweep_runs_its_part(slurm, sweep_script, part, words):
    job = _job(slurm, [sweep_script, "--part", part], CODE="1", SLURM_ARRAY_JOB_ID="120", SLURM_ARRAY_TASK_ID="3")
    assert job.wait(20) == 1
    assert _told(slurm, "python") == ["-m", "mllm_keeplora", "sweep", "s.yaml", *words]
    assert _told(slurm, "scontrol") == []


def test_a_stopped_job_of_an_array_queues_itself_again_and_not_the_array(slurm, sweep_script):
    array = {"SLURM_ARRAY_JOB_ID": "123", "SLURM_ARRAY_TASK_ID": "3"}
    job = _job(slurm, [sweep_script, "--part", "tune"], CODE="130", WAITS="yes", **array)
    _wait_for(slurm / "ready")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 130
    assert _told(slurm, "scontrol") == ["requeue 123_3"]


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_is_the_head_of_the_script(script):
    text = (ROOT / "scripts" / script).read_text()
    head = text.split("\n#SBATCH")[0].split("\nset -euo")[0].splitlines()[1:]
    for words in (["--help"], ["-h"]):
        done = bash(ROOT / "scripts" / script, *words)
        assert done.returncode == 0 and "Usage: " in done.stdout
        assert done.stdout.splitlines() == [line.removeprefix("# ") for line in head]
    assert bash(ROOT / "scripts" / script).returncode == 2


def test_help_of_a_sweeps_script_is_its_head(slurm, sweep_script):
    done = bash(sweep_script, "--help")
    assert done.returncode == 0 and "Usage: " in done.stdout
    head = sweep_script.read_text().split("\n#SBATCH")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line.removeprefix("# ") for line in head]


@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck is not installed (extra `dev`); scripts go unchecked")
def test_shellcheck_finds_nothing(slurm, sweep_script):
    scripts = [*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").glob("*.sbatch"), ROOT / ".ci/run", sweep_script]
    assert len(scripts) >= 10
    done = subprocess.run([SHELLCHECK, *scripts], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout
    strict = [path.name for path in scripts if "set -euo pipefail" not in path.read_text()]
    assert strict == []
