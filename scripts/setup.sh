#!/usr/bin/env bash
# Make the virtual environment .venv and install the package into it; nothing is done twice.
# Usage: bash scripts/setup.sh [EXTRAS]        e.g. bash scripts/setup.sh dev
#   PYTHON=python3.12 bash scripts/setup.sh    to choose the interpreter
#   VENV=/path/to/env bash scripts/setup.sh    to choose the folder
#   RESOLUTION=lowest-direct bash scripts/setup.sh dev    the lowest versions that pyproject.toml allows
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-}"
venv="${VENV:-.venv}"
python="${PYTHON:-python3}"
wanted="$(cat pyproject.toml scripts/setup.sh | cksum) ${extras} ${RESOLUTION:-} $(pwd)"
stamp="$venv/installed-${extras:-plain}"

if [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
    exit 0
fi
echo "installing into $venv (a few minutes the first time) ..." >&2
[[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
if [[ -n "${RESOLUTION:-}" ]]; then
    "$venv/bin/python" -m pip install --quiet uv
    "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --resolution "$RESOLUTION" -e ".${extras:+[$extras]}"
else
    "$venv/bin/python" -m pip install --quiet -e ".${extras:+[$extras]}"
fi
if [[ "$extras" == *dev* ]] && ! command -v chromium chromium-browser google-chrome > /dev/null; then
    # the tests look at the report in a browser; without one they leave that out
    if [[ "$(id -u)" == 0 ]] && command -v apt-get > /dev/null; then
        (apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) > /dev/null 2>&1 ||
            echo "Chromium could not be installed; the report is not looked at in a browser" >&2
    else
        echo "no Chromium here; install it to have the tests look at the report in a browser" >&2
    fi
fi
printf '%s' "$wanted" > "$stamp"
