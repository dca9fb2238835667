"""The copyable example of the documentation and that of the README are run as they stand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def first_script(page: str, heading: str) -> str:
    """The first block of commands below a heading."""
    section = (ROOT / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)[0]


@pytest.mark.slow
def test_own_data_examples_learn_their_domain(tmp_path):
    folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    configs = []
    for script in (first_script("docs/data.md", "An example from nothing"), first_script("README.md", "Your own data")):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        configs.append((tmp_path / "my_run.yaml").read_text())
    assert configs[0] == configs[1], "the README's run is the one that the page's data is drawn for"
    results = json.loads((tmp_path / "runs/lamps/results.json").read_text())
    assert results["domains"] == ["Lamps"]
    assert results["metrics"]["last"] > results["blind"][0] + 20
    assert (tmp_path / "runs/lamps/report.html").stat().st_size > 10_000
