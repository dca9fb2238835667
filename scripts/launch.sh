#!/usr/bin/env bash
# Start a command of mllm-keeplora on several processes of this machine; run_sequence.sh and eval_only.sh call this.
# Usage: bash scripts/launch.sh COMMAND TARGET [NGPU] [ARGUMENT]...
#   COMMAND, TARGET, ARGUMENT   as in `mllm-keeplora COMMAND TARGET ARGUMENT...`
#   NGPU                        processes, one for each GPU; default: every visible GPU, else 1
# Uses this repository's .venv, or $VENV; else the python on PATH.
set -euo pipefail

if [[ $# -lt 2 || "$1" == -h || "$1" == --help ]]; then
    sed -n '2,6s/^# //p' "${BASH_SOURCE[0]}"
    [[ "${1:-}" == -h || "${1:-}" == --help ]] || exit 2
    exit 0
fi
python="${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin/python"
[[ -n "${VENV:-}" || -x "$python" ]] || python=python

program=(-m mllm_keeplora "$1" "$2")
shift 2
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    processes="$1"
    shift
else
    processes="$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
fi
[[ "$processes" -gt 1 ]] || exec "$python" "${program[@]}" "$@"
exec "$python" -m mllm_keeplora.system.launch --standalone --nproc_per_node "$processes" "${program[@]}" "$@"
