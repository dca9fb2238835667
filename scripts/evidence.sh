#!/usr/bin/env bash
# Make the README's table and pictures again: every strategy, rate and seed on the mini benchmark, two runs side by side.
# Usage: bash scripts/evidence.sh [KEY=VALUE]...      e.g. bash scripts/evidence.sh output=runs/sweeps/again
# About three hours on two CPU cores. Run it again to continue after an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
fi
folder=runs/sweeps/mini_dcl
for argument in "$@"; do
    [[ "$argument" == output=* ]] && folder="${argument#output=}"
done
bash scripts/setup.sh
"${VENV:-.venv}/bin/mllm-keeplora" sweep mini_dcl "$@" --jobs 2
cp "$folder/score_matrices.png" "$folder/trade_off.png" docs/
cat "$folder/tables.md"
