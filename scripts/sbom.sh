#!/usr/bin/env bash
# Write a bill of materials (CycloneDX, JSON) of what is installed in the virtual environment.
# Usage: bash scripts/sbom.sh [FILE]         default: sbom.json; VENV as in setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

file="$(realpath -m "${1:-sbom.json}")"
bin="${VENV:-.venv}/bin"
tools="$(mktemp -d)" # a folder of its own: the tool is no part of what it lists
trap 'rm -rf "$tools"' EXIT
"$bin/python" -m venv "$tools"
"$tools/bin/python" -m pip install --quiet cyclonedx-bom
"$tools/bin/cyclonedx-py" environment --pyproject pyproject.toml --output-format JSON --output-file "$file" "$bin/python"
echo "written  $file"
