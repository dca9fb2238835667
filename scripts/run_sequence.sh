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
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" run "$@"
