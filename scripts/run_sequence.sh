#!/usr/bin/env bash
# Run a whole sequence on several processes of this machine; the same command continues an interrupted run.
# Usage: bash scripts/run_sequence.sh CONFIG [NGPU] [KEY=VALUE]...
#   CONFIG   a run's YAML file, or a shipped name (mllm-keeplora list runs)
#   NGPU     processes, one for each GPU; default: every visible GPU, else 1
#   e.g. bash scripts/run_sequence.sh mllm_dcl_llava15 4 deepspeed=zero2 data_root=/data/MLLM-CL
# Uses this repository's .venv, or $VENV; else the python on PATH. On a CPU the processes share the cores.
# Exit code: 0 done, 2 a mistake in what was given, 75 stopped by a signal (start it again), 1 a fault.
set -euo pipefail

if [[ $# -eq 0 || "$1" == -h || "$1" == --help ]]; then
    sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}"
    exit "$(($# == 0 ? 2 : 0))"
fi
python="${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin/python"
[[ -n "${VENV:-}" || -x "$python" ]] || python=python

config="$1"
shift
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    processes="$1"
    shift
else
    processes="$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
fi
program=(-m mllm_keeplora run "$config" "$@")
[[ "$processes" -gt 1 ]] || exec "$python" "${program[@]}"
exec "$python" -m mllm_keeplora.system.launch --standalone --nproc_per_node "$processes" "${program[@]}"
