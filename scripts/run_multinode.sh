#!/usr/bin/env bash
# Run a whole sequence on several nodes without a scheduler: start the same command on each of them.
# Usage: bash scripts/run_multinode.sh CONFIG NODES HEAD_HOST[:PORT] [NGPU_PER_NODE] [KEY=VALUE]...
#   CONFIG          a run's YAML file, or a shipped name; the same for every node
#   NODES           how many nodes there are
#   HEAD_HOST       the node that the others meet at, by a name or address that all of them reach; port 29500 by default
#   NGPU_PER_NODE   processes on each node, one for each GPU; default: every visible GPU, else 1
#   e.g. on node1 and on node2: bash scripts/run_multinode.sh mllm_dcl_llava15 2 node1 8 deepspeed=zero2
# Nodes wait for each other, ten minutes at most. The run's folder (`output`) must lie on a file system that all nodes
# share: the first process alone writes the run, but every process its part of a DeepSpeed checkpoint. The data and the
# base must be found under the same path everywhere. Two such runs at once at the same head need two ports, or RDZV_ID.
# Uses this repository's .venv, or $VENV; else the python on PATH. The same commands continue an interrupted run.
set -euo pipefail

if [[ $# -eq 0 || "$1" == -h || "$1" == --help ]]; then
    sed -n '2,12s/^# //p' "${BASH_SOURCE[0]}"
    exit "$(($# == 0 ? 2 : 0))"
fi
if [[ $# -lt 3 || ! "$2" =~ ^[1-9][0-9]*$ ]]; then
    echo "error: CONFIG, NODES (a number) and HEAD_HOST are needed; see --help" >&2
    exit 2
fi
python="${VENV:-$(dirname "${BASH_SOURCE[0]}")/../.venv}/bin/python"
[[ -n "${VENV:-}" || -x "$python" ]] || python=python

config="$1" nodes="$2" head="$3"
shift 3
[[ "$head" == *:* ]] || head="$head:29500"
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    processes="$1"
    shift
else
    processes="$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
fi
exec "$python" -m mllm_keeplora.system.launch --nnodes "$nodes" --nproc_per_node "$processes" \
    --rdzv_backend c10d --rdzv_endpoint "$head" --rdzv_id "${RDZV_ID:-mllm-keeplora}" \
    -m mllm_keeplora run "$config" "$@"
