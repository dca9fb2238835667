"""The README's copyable example is run as it stands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.slow
def test_own_data_example_of_the_readme_learns_its_domain(tmp_path):
    section = README.read_text(encoding="utf-8").split("## Your own data")[1].split("\n## ")[0]
    (script,) = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "runs/lamps/results.json").read_text())
    assert results["domains"] == ["Lamps"]
    assert results["metrics"]["last"] > results["blind"][0] + 20
    assert (tmp_path / "runs/lamps/report.html").stat().st_size > 10_000
