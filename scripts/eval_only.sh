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
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" eval "$@"
