"""All inputs, laid out in a folder, with what reads them before anything is trained or answered."""

from __future__ import annotations

import os
from pathlib import Path

from fuzzing.classes import classes_of
from fuzzing.configs import configs_of
from fuzzing.data import clips_of, pictures_of, records_of
from fuzzing.kept import bases_of, runs_of
from fuzzing.layouts import layouts_of
from fuzzing.samples import Target, written_data


def targets(home: Path) -> list[Target]:
    """Lay out a folder of valid inputs, and give them with what reads them."""
    os.environ["MLLM_KEEPLORA_CACHE"] = str(home / "cache")
    without_figures()
    data = written_data(home / "data")
    found = [
        *configs_of(home, data),
        *records_of(home, data),
        *pictures_of(home),
        *clips_of(home),
        *runs_of(home, data),
        *bases_of(home),
        *classes_of(home, data),
        *layouts_of(home),
    ]
    for target in found:
        target.path.parent.mkdir(parents=True, exist_ok=True)
        target.path.write_bytes(target.valid)
    return found


def without_figures() -> None:
    """Leave drawing out: it takes a second for each page, and draws what was read before."""
    from mllm_keeplora.report import compared, page
    from mllm_keeplora.report.render import html

    compared.in_both = html.in_both = lambda draw: (b"", b"")
    page.inspection_figures = lambda facts: []
