#!/usr/bin/env bash
# Make tables and pictures of docs/results.md again: every strategy, rate and seed on the mini benchmark, two at a time.
# Usage: bash scripts/evidence.sh [SWEEP]...      default: mini_dcl; also: mini_dcl_variants, mini_all
# On two CPU cores an hour and a quarter, four hours, eight. Run it again to continue after an interruption.
# Runs go to runs/sweeps/SWEEP; what that page shows, and every run's results, to docs/evidence/SWEEP.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
fi
bash scripts/setup.sh
for sweep in "${@:-mini_dcl}"; do
    folder="runs/sweeps/$sweep" kept="docs/evidence/$sweep"
    "${VENV:-.venv}/bin/mllm-keeplora" sweep "$sweep" --jobs 2
    (cd "$folder" && find . -mindepth 3 -maxdepth 3 \( -name config.yaml -o -name results.json \)) |
        while read -r file; do install -D -m 644 "$folder/$file" "$kept/$file"; done
    cp "$folder"/{sweep.json,tables.md,score_matrices.png,trade_off.png} "$kept/"
    cat "$folder/tables.md"
done
