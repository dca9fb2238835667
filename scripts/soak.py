"""Kill runs again and again, at random moments, and see whether they end as if nobody had touched them.

Each strategy is run once in peace, and then killed with SIGKILL at random moments until it has ended in spite of them;
then the next one, in turns, until there were as many kills as asked for. Learnt and answered must be the same, byte by
byte, every artefact must prove itself, and no process, temporary file or checkpoint may be left.

    python scripts/soak.py --kills 200 --strategies keeplora replay gainlora
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mllm_keeplora.runs import RunDir

MEASURED = ("predictions/*.jsonl", "predictions/*.json", "*.safetensors", "adapter/*", "manifest.json")
SMALL = ["domains=[RS,Med]", "train.epochs=0.06", "train.checkpoint_steps=1", "eval.limit=16", "eval.suite_limit=16",
         "threads=1", "diagnostics.samples=4"]  # fmt: skip


OWN = {
    "keeplora": ["strategy.grad_samples=16", "strategy.feature_samples=16"],
    "gainlora": ["strategy.gate_samples=16"],
    "ewc": ["strategy.samples=16"],
}


def command(strategy: str, output: Path) -> list[str]:
    config = "mini_dcl" if strategy == "keeplora" else f"mini_dcl_{strategy}"
    words = [f"output={output}", *SMALL, *OWN.get(strategy, [])]
    return [sys.executable, "-m", "mllm_keeplora", "run", config, *words]


def artefacts(run: Path) -> dict[str, bytes]:
    folders = [run / "prepare", *(run / "domains").iterdir()]
    paths = {path for folder in folders for pattern in MEASURED for path in folder.glob(pattern)}
    return {str(path.relative_to(run)): path.read_bytes() for path in paths if path.is_file()}


def is_running(marker: str) -> bool:
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in each.read_bytes():
                return True
        except OSError:  # it has just ended
            continue
    return False


def differences(peaceful: Path, killed: Path) -> Iterator[str]:
    """Say what the killed run has that the peaceful one has not, or the other way round."""
    one, two = artefacts(peaceful), artefacts(killed)
    yield from (name for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name))
    before, after = (json.loads((run / "results.json").read_text()) for run in (peaceful, killed))
    yield from (key for key in ("score_matrix", "zero_shot", "general", "metrics") if before[key] != after[key])
    yield from (fault for _, fault in RunDir(killed).load().faults())
    for pattern in ("*.tmp", "*.part", "checkpoint*"):
        yield from (f"left over: {path.relative_to(killed)}" for path in killed.rglob(pattern))
    if is_running(str(killed)):
        yield "a process still runs"


def soak(strategy: str, output: Path, longest: float, sample: random.Random, quiet: dict) -> list[tuple[float, str]]:
    """Kill a run until it ends; gives after how many seconds each start was killed, and in which stage."""
    kills: list[tuple[float, str]] = []
    while True:
        process = subprocess.Popen(command(strategy, output), start_new_session=True, **quiet)
        # Starts that are killed early show that nothing is lost; later ones that they get on.
        wait = sample.uniform(0.0, longest) if sample.random() < 0.5 else sample.uniform(0.5, 1.0) * longest
        try:
            if (code := process.wait(wait)) == 0:
                return kills
            raise SystemExit(f"{strategy} ended by itself with code {code} after {len(kills)} kills: {output}")
        except subprocess.TimeoutExpired:
            longest *= 1.05  # on a machine that has become busier than it was a run must end, too
            done = [*json.loads((output / "run.json").read_text())["stages"]] if (output / "run.json").exists() else []
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills.append((wait, done[-1] if done else "start"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--strategies", nargs="+", default=["keeplora", "replay", "gainlora", "ewc", "routed"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keeps runs here, and goes on from those that are there")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="soak_"))
    folder.mkdir(parents=True, exist_ok=True)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    sample, tally, different, runs = random.Random(asked.seed), Counter(), 0, 0
    seconds = {}
    for strategy in asked.strategies:
        started = time.monotonic()
        in_peace = subprocess.run(
            command(strategy, folder / strategy), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if in_peace.returncode:
            raise SystemExit(f"{strategy} fails in peace, with code {in_peace.returncode}: {in_peace.stderr.decode()}")
        seconds[strategy] = time.monotonic() - started
    while sum(tally.values()) < asked.kills:
        strategy = asked.strategies[runs % len(asked.strategies)]
        killed, runs = folder / f"{strategy}_{runs:03d}", runs + 1
        kills = soak(strategy, killed, 0.5 * seconds[strategy], sample, quiet)
        tally.update(stage.partition("/")[2].partition("/")[0] or stage for _, stage in kills)
        found = list(differences(folder / strategy, killed))
        different += bool(found)
        print(f"{strategy:<10} {len(kills):>3} kills, {len(found)} differences", *found, sep="\n    ", flush=True)
        if not found:
            shutil.rmtree(killed)
    print(
        f"\n{sum(tally.values())} kills in {runs} runs, {different} runs with differences; last stage done when killed:"
    )
    for stage, count in tally.most_common():
        print(f"  {stage:<12} {count}")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
