#!/usr/bin/env bash
# Ask and grade a saved run, a model or an adapter on several processes of this machine, without training.
# Usage: bash scripts/eval_only.sh RUN [NGPU] [OPTION]...
#   RUN      a run directory, a model, or a peft adapter's folder
#   NGPU     processes, one for each GPU; default: every visible GPU, else 1
#   OPTION   those of `mllm-keeplora eval`: --after N, --domains A,B, --suite NAME, --batch-size N, --benchmark NAME, ...
#   e.g. bash scripts/eval_only.sh runs/mllm_dcl_llava15 4 --after 3 --domains RS,Med
# Uses this repository's .venv, or $VENV; else the python on PATH. On a CPU the processes share the cores.
set -euo pipefail

if [[ $# -eq 0 || "$1" == -h || "$1" == --help ]]; then
    sed -n '2,8s/^# //p' "${BASH_SOURCE[0]}"
    exit "$(($# == 0 ? 2 : 0))"
fi
python="${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin/python"
[[ -n "${VENV:-}" || -x "$python" ]] || python=python

run="$1"
shift
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    processes="$1"
    shift
else
    processes="$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
fi
program=(-m mllm_keeplora eval "$run" "$@")
[[ "$processes" -gt 1 ]] || exec "$python" "${program[@]}"
exec "$python" -m mllm_keeplora.system.launch --standalone --nproc_per_node "$processes" "${program[@]}"
