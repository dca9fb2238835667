#!/usr/bin/env bash
# Set everything up and run the main job: KeepLoRA over the five domains of the mini benchmark, on whatever is here.
# Usage: bash scripts/demo.sh [KEY=VALUE]...      e.g. bash scripts/demo.sh train.lr=2e-3 output=runs/gentle
# Run it again to continue after an interruption.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
    exit 0
fi
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/mllm-keeplora" run mini_dcl "$@"
