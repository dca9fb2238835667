"""Pages, exported files and terminal tables say what they said when `golden/` was written.

Text files are held byte by byte; of a page, every text, number and spoken attribute, in order. To write them anew, for
a stated reason: python -m tests.unit.report.render.test_golden
"""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from matplotlib.figure import Figure
from packaging.version import Version
from rich.console import Console

from mllm_keeplora.report.compared import Choice, load_results, write_comparison
from mllm_keeplora.report.render.diagnostics import UnitFacts, inspection, inspection_figures
from mllm_keeplora.report.render.export import exported, run_tables
from mllm_keeplora.report.render.html import WrongAnswer, render_html
from mllm_keeplora.report.render.tables import compare_table, memory_table, results_table
from tests.unit.report.render.conftest import RESULTS

GOLDEN = Path(__file__).parent / "golden"
EVIDENCE = Path(__file__).parents[4] / "docs" / "evidence"
LAYERS = [f"model.layers.{block}.{name}" for block in (0, 1) for name in ("q_proj", "down_proj")] + ["mm.projector.0"]


def units() -> list[UnitFacts]:
    """Three units in the shape that `diagnose` writes; the second measured no gradient, the last a set more."""
    made = []
    for i, name in enumerate(("RS", "Med & co", "AD")):
        capacity, changes, inputs, gradient = {}, {}, {}, {}
        for j, layer in enumerate(LAYERS):
            d_in = 128 if "down" in layer else 64
            parts = [10 + j, *(3 + (j + k) % 4 for k in range(i + 1))]
            capacity[layer] = {"d_in": d_in, "parts": parts, "free": d_in - sum(parts)}
            changes[layer] = {"update": 0.013 * (i + 1) + 0.001 * j}
            if i or j:
                leaks = {"leak": 1e-7 * (j + 1), "leak_evaluated": 2e-7 * (i + 1), "leak_bfloat16": 3e-3 + 1e-4 * j}
                changes[layer] |= leaks if i else {"leak": 0.0}
            for k, asked in enumerate(("RS", "Med & co", "AD", "general")[: i + 2]):
                covered = [0.5 / (part + 1 + 0.1 * j + k) for part in range(i + 2)]
                inputs.setdefault(asked, {})[layer] = {"interference": 0.01 * (i + 1) + 0.001 * k, "covered": covered}
            shares = {"protected": 0.5 + 0.01 * j, "captured": 0.3 - 0.01 * i, "discarded": 0.2 - 0.01 * (j - i)}
            gradient[layer] = {**shares, "captured_of_residual": 0.6 + 0.01 * i} if j != 1 else {"norm": 1.0}
        diagnostics = {"capacity": capacity, "changes": changes, "inputs": inputs}
        made.append(UnitFacts(name, {} if i == 1 else {"gradient": gradient}, diagnostics))
    return made


def told() -> dict:
    """The fixture's results with everything that a page can show."""
    results = copy.deepcopy(RESULTS)
    results["blind_per_type"] = {"RS": {"count": 12.5}}
    results["errors"] = {"RS": {"wrong": 3, "off_by_one": 1}, "Med": {"blank": 2}}
    suffix = {"Yes|No": " yes?", "*": " <which> & why?"}
    results["grading"] = {"RS": {"scorer": "dcl_fin", "prompt_suffix": suffix, "image_mode": "pad", "batch_size": 16},
                          "Med": {"scorer": "exact", "prompt_suffix": "", "max_new_tokens": 8}}  # fmt: skip
    return results | {"strict": {"RS": 40.0}, "peak_memory_bytes": 3 << 29}


def written() -> dict[str, str]:
    """File of the golden folder -> what this version writes."""
    keep, tune = EVIDENCE / "mini_dcl" / "final", EVIDENCE / "mini_dcl" / "tune"
    paths = sorted(keep.glob("*/results.json"))
    finals, tried = load_results(paths), load_results(sorted(tune.glob("*/results.json")))
    single = finals[[path.parent.name.startswith("keeplora") for path in paths].index(True)]
    bare = {key: value for key, value in RESULTS.items() if key in {"domains", "strategy", "metrics", "score_matrix"}}
    bare["score_matrix"] = [[None] * 5] * 4 + [[1.0, 2.0, 3.0, 4.0, None]]
    wrong = [WrongAnswer("RS", "Which <b>?", "", "a | b", b"PNG"), WrongAnswer("AD", "How many?", "3 & 4", "5")]
    published = (
        ["", "RS", "BWT", "source"],
        [["this run", "59.7", "-2.7", ""], ["LoRA & co", "50.0", "–", "a <paper>"]],
    )
    pages = {
        "page.html": render_html(told(), wrong, inspection_figures(units()), published),
        "bare.html": render_html(bare | {"name": "A <title>"}),
        "evidence.html": render_html(single),
    }
    tables = exported(run_tables(told()) | {f"evidence_{k}": table for k, table in run_tables(single).items()})
    choice = Choice(
        "train.lr",
        {run["name"]: run["settings"]["train.lr"] for run in finals},
        tried,
        (["", "0.001", "0.002"], [["keeplora", "80.1", "failed <>"], ["a|b", "-2.5", "–"]]),
        ["A note & more.", "Another."],
    )
    compared = {}
    for name, chosen in (("chosen", choice), ("plain", None)):
        with TemporaryDirectory() as folder:
            write_comparison(Path(folder), f"mini <{name}>", finals if chosen else finals[:2], chosen)
            found = {f"{name}_{path.name}": path for path in sorted(Path(folder).iterdir()) if path.suffix != ".png"}
            compared |= {key: path.read_text(encoding="utf-8") for key, path in found.items()}
    shown = {
        "results.txt": results_table(told()),
        "compare.txt": compare_table(finals),
        "inspect.txt": inspection(units()),
        "memory.txt": memory_table({"train": {"weights": 3e9, "rest": 2e6}, "evaluate": {"weights": 1e9}}, 5e8, "cpu"),
    }
    return {**pages, **tables, **compared, **{name: printed(table) for name, table in shown.items()}}


def printed(table) -> str:
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(table)
    return console.file.getvalue()


class Said(HTMLParser):
    """Texts of a page in order, cells of tables marked, empty ones too, and the attributes that are read aloud."""

    def __init__(self, page: str):
        super().__init__()
        self.pieces = [""]
        self.hidden = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.hidden = tag == "style"
        self.pieces += [f"{name}={value}" for name, value in attrs if name in {"alt", "title"} and value]
        self.pieces.append("| " if tag in {"th", "td"} else "")

    def handle_endtag(self, tag):
        self.hidden = False
        self.pieces.append("")

    def handle_data(self, data):
        if not self.hidden:
            self.pieces[-1] += data


def said(page: str) -> list[str]:
    """Every text and spoken attribute of a page, spaces evened out."""
    return [text for text in (" ".join(piece.split()) for piece in Said(page).pieces) if text]


def stored(name: str, text: str) -> str:
    """What the golden folder keeps: of a page its texts, since pictures and style are not held here."""
    return json.dumps(said(text), ensure_ascii=False, indent=0) + "\n" if name.endswith(".html") else text


OLDER_RICH = Version(version("rich")) < Version("15")  # sets some columns wider


def evened(text: str) -> str:
    """A table without how wide it is set."""
    return re.sub("[ ─]+", "", text)


def golden_name(name: str) -> str:
    return re.sub(r"\.html$", ".json", name)


def test_everything_reads_as_it_did(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *args, **kwargs: None)  # takes most of the time
    now = written()
    assert {golden_name(name) for name in now} == {path.name for path in GOLDEN.iterdir()}
    for name, text in now.items():
        found, before = stored(name, text), (GOLDEN / golden_name(name)).read_text(encoding="utf-8")
        if name.endswith(".txt") and OLDER_RICH:
            found, before = evened(found), evened(before)
        assert found == before, name


def test_the_reader_of_pages_sees_texts_numbers_and_spoken_attributes():
    page = '<style>p{}</style><h1>A &amp; <b>−2.7</b></h1>\n<img alt="map" src="x"><td></td><p>x&nbsp;%</p>'
    assert said(page) == ["A &", "−2.7", "alt=map", "|", "x %"]


if __name__ == "__main__":
    for name, text in written().items():
        (GOLDEN / golden_name(name)).write_text(stored(name, text), encoding="utf-8")
