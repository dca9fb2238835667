"""A sweep in parts, for schedulers: one run of it, or its choice, as a job of its own; and a SLURM script of them all.

A part that is done ends at once. Parts may run at the same time on folders that their machines share, since a run is
locked by the process that works on it. What is left over, the sweep without a part does.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.errors import UserError
from mllm_keeplora.sweeps.cells import Cell, Runner, log_of, visible_devices
from mllm_keeplora.sweeps.plan import SweepConfig, chosen_of, final_cell, further_cell, tune_cells
from mllm_keeplora.sweeps.sweep import check_sweep, nothing_of, tune
from mllm_keeplora.system import files

PART = re.compile(r"(?P<kind>tune|further|final):(?P<number>[1-9]\d*)/(?P<total>[1-9]\d*)")
CHOICE, CHOICE_FILE = "tune", "choice.json"  # the part that finishes the tuning, and where it keeps what it chose


def run_part(sweep: SweepConfig, part: str, jobs: int | None = None) -> list[str]:
    """Do one part of a sweep; returns lines that say what came of it.

    Args:
        sweep: from `load_sweep`.
        part: `tune:K/N`, run K of the N runs of the grid; `further:K/N`, the next value beyond the grid of strategy K
            of N, if its best so far lies at the edge; `tune`, whatever of the tuning is not done, and the choice;
            `final:K/N`, run K of the N final runs of what was chosen. K begins at 1.
        jobs: of `tune`: runs side by side, as in `run_sweep`.

    Raises:
        UserError: the part is none of these, N is not the number of runs, nothing is chosen yet or for the strategy,
            or the run failed.
    """
    if part == CHOICE:
        check_sweep(sweep)
        tunings = tune(sweep, Runner(jobs, visible_devices()))
        chosen = chosen_of(tunings)
        files.write_json(sweep.folder / CHOICE_FILE, {"rule": _rule(sweep), "chosen": chosen})
        told = [f"{label}: chose {sweep.tune.key} {value:g}" for label, value in chosen.items()]
        return told + [nothing_of(sweep, label) for label in tunings if label not in chosen]
    cell = _cell(sweep, part)
    if cell is None:
        return [f"{part}: nothing further to try"]
    if cell.results() is not None:
        return [f"{cell.folder} is done"]
    check_sweep(sweep)
    if Runner(1, visible_devices()[:1]).run([cell], part)[0] is None:
        raise UserError(f"run {cell.folder} failed; see {log_of(cell.folder)}")
    return [f"{cell.folder} is done"]


def slurm_script(sweep: SweepConfig, command: Sequence[str], folder: Path) -> str:
    """Write a bash script that submits the whole sweep to SLURM, and is what its jobs run.

    Args:
        sweep: from `load_sweep`.
        command: the words that start this very sweep.
        folder: the folder to start it in.
    """
    return HEAD.format(
        name=sweep.name,
        **{f"num_{kind}": number for kind, number in _totals(sweep).items()},
        rounds=sweep.tune.extensions,
        folder=shlex.quote(str(folder)),
        command=shlex.join(command),
    ) + BODY.lstrip("\n")


def _totals(sweep: SweepConfig) -> dict[str, int]:
    """How many parts there are of each kind."""
    labels = len(sweep.strategies)
    return {"tune": len(tune_cells(sweep)), "further": labels, "final": labels * len(sweep.final.seeds)}


def _cell(sweep: SweepConfig, part: str) -> Cell | None:
    """The run that a part names; None where the grid goes no further."""
    match = PART.fullmatch(part)
    if match is None:
        raise UserError(f"--only must be tune:K/N, further:K/N, tune or final:K/N, got {part!r}")
    kind, number, total = match["kind"], int(match["number"]), int(match["total"])
    now = _totals(sweep)[kind]
    if total != now:
        raise UserError(f"--only {part}: sweep {sweep.name} has {now} such runs now; write its script again")
    if number > total:
        raise UserError(f"--only {part}: there is no run {number} of {total}")
    if kind == "tune":
        return tune_cells(sweep)[number - 1]
    labels, seeds = list(sweep.strategies), sweep.final.seeds
    if kind == "further":
        return further_cell(sweep, labels[number - 1])
    path = sweep.folder / CHOICE_FILE
    if not path.is_file():
        raise UserError(f"sweep {sweep.name} has not chosen yet: {path} is missing; run it with --only tune first")
    kept = files.read_json(path, files.OBJECT)
    if kept["rule"] != _rule(sweep):
        raise UserError(f"{path} was chosen among other settings; run the sweep with --only tune again")
    chosen, (seed, place) = kept["chosen"], divmod(number - 1, len(labels))  # in the order of `final_cells`
    if labels[place] not in chosen:
        raise UserError(nothing_of(sweep, labels[place]))
    return final_cell(sweep, labels[place], chosen[labels[place]], seeds[seed])


def _rule(sweep: SweepConfig) -> dict:
    """What a choice depends on."""
    return sweep.model_dump(include={"run", "strategies", "tune"})


HEAD = """\
#!/usr/bin/env bash
# Sweep {name} on SLURM: {num_tune} runs to choose settings, up to {rounds} rounds of further values where the best lies
# at the edge, the choice, {num_final} final runs, the comparison; each waits for the one before. Runs of a kind are an
# array: as many at a time as the cluster has room.
# Usage: bash FILE [SBATCH OPTION]...      the options are those of every job
#   e.g. bash FILE --gpus 1 --cpus-per-task 8 --time 8:00:00 --partition gpu
# A run sees one GPU. The jobs that choose and compare run what failed once more.
# Three minutes before the end of its time a job stops its runs and queues again. What is done is not done again:
# submit once more after a failure. Written by `mllm-keeplora sweep`; written anew when the sweep's YAML changes.
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --open-mode=append
set -euo pipefail

name={name} num_tune={num_tune} num_further={num_further} num_final={num_final} rounds={rounds}
folder={folder}
command=({command})
"""

BODY = r"""
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,9s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
fi
if [[ "${1:-}" != --part ]]; then
    this="$(realpath "${BASH_SOURCE[0]}")"
    submit() { # PART [SBATCH OPTION]...; prints the job's number
        local part="$1" job
        shift
        job="$(sbatch --parsable --job-name="$name-$part" --chdir="$folder" "$@" "$this" --part "$part")" || exit 1
        echo "submitted $part as job ${job%%;*}" >&2
        echo "${job%%;*}"
    }
    tune="$(submit tune "$@" --array="1-$num_tune")"
    for ((round = 1; round <= rounds; round++)); do
        tune="$(submit further "$@" --array="1-$num_further" --dependency="afterany:$tune")"
    done
    choose="$(submit choose "$@" --dependency="afterany:$tune")"
    final="$(submit final "$@" --array="1-$num_final" --dependency="afterok:$choose" --kill-on-invalid-dep=yes)"
    submit compare "$@" --dependency="afterany:$final" > /dev/null || exit 1
    exit 0
fi

case "$2" in
    tune) command+=(--only "tune:$SLURM_ARRAY_TASK_ID/$num_tune") ;;
    further) command+=(--only "further:$SLURM_ARRAY_TASK_ID/$num_further") ;;
    choose) command+=(--only tune) ;;
    final) command+=(--only "final:$SLURM_ARRAY_TASK_ID/$num_final") ;;
    compare) ;;
esac
job="$SLURM_JOB_ID"
if [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then
    job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" # the number alone may stand for the whole array
fi

process="" told="" interrupted=""
# shellcheck disable=SC2329 # the traps call it
forward() {
    interrupted=yes
    [[ "$told" == USR1 ]] || told="$1"
    [[ -z "$process" ]] || kill -TERM "$process" 2> /dev/null || true
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

"${command[@]}" &
process=$!
while true; do
    interrupted="" code=0
    wait "$process" || code=$?
    [[ -n "$interrupted" ]] || break # else a signal ended `wait`, not the sweep
done
again=""
if [[ -n "$told" && "$code" -ne 0 && "$code" -ne 2 ]]; then
    again=yes
fi
if [[ -n "$again" && "$told" != USR1 ]]; then
    state="$(scontrol show job "$job" || true)"
    [[ ! "$state" =~ JobState=(CANCELLED|COMPLETING) ]] || again=""
fi
if [[ -n "$again" ]]; then
    echo "stopped before the end (code $code); the job queues again" >&2
    scontrol requeue "$job"
fi
exit "$code"
"""
