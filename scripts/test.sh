#!/usr/bin/env bash
# Set everything up and run the linter and the tests.
# Usage: bash scripts/test.sh [--slow] [PYTEST ARGUMENT]...      --slow adds the tests that take minutes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

arguments=()
for argument in "$@"; do
    case "$argument" in
        -h | --help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;;
        --slow) arguments+=(-m "slow or not slow") ;;
        *) arguments+=("$argument") ;;
    esac
done
bash scripts/setup.sh dev
bin="${VENV:-.venv}/bin"
"$bin/ruff" check .
"$bin/ruff" format --check .
exec "$bin/python" -m pytest "${arguments[@]+"${arguments[@]}"}"
