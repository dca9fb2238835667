#!/usr/bin/env bash
# Make the README's table and pictures again: every strategy, rate and seed on the mini benchmark, two runs side by side.
# Usage: bash scripts/evidence.sh [FOLDER]      default: runs/sweeps/mini_dcl
# About three hours on two CPU cores. Run it again to continue after an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
fi
folder="${1:-runs/sweeps/mini_dcl}"
bash scripts/setup.sh
"${VENV:-.venv}/bin/mllm-keeplora" sweep mini_dcl output="$folder" --jobs 2
cp "$folder/score_matrices.png" "$folder/trade_off.png" docs/
cat "$folder/tables.md"
