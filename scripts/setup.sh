#!/usr/bin/env bash
# Make the virtual environment .venv and install the package into it; nothing is done twice.
# Usage: bash scripts/setup.sh [EXTRAS]        e.g. bash scripts/setup.sh dev
#   PYTHON=python3.12 bash scripts/setup.sh    to choose the interpreter
#   VENV=/path/to/env bash scripts/setup.sh    to choose the folder
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
venv="${VENV:-.venv}"
python="${PYTHON:-python3}"
wanted="$(cat pyproject.toml scripts/setup.sh | cksum) ${extras} $(pwd)"
stamp="$venv/installed-${extras:-plain}"

if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    exit 0
fi
echo "installing into $venv (a few minutes the first time) ..." >&2
[[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
"$venv/bin/python" -m pip install --quiet -e ".${extras:+[$extras]}"
printf '%s' "$wanted" > "$stamp"
