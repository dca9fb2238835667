"""Tables for other programs, and what a run's page says about wrong answers and published results."""

import csv
import io

import pytest

from mllm_keeplora.report.render.export import as_csv, as_latex, as_markdown, exported, run_tables
from mllm_keeplora.report.render.html import render_html

TABLE = (["", "Last", "BWT"], [["KeepLoRA_v1 & co", "86.0 ±0.1", "-2.5"], ["50 % | {x}", "–", "+0.3, -1.0"]])


@pytest.fixture
def told(results):
    first, second = results["domains"][:2]
    errors = {first: {"wrong": 3, "off_by_one": 1}, second: {"blank": 2}}
    grading = {
        first: {"scorer": "dcl_fin", "prompt_suffix": {"Yes|No": " yes?", "*": " which?"}, "image_mode": "pad",
                "max_new_tokens": 128, "batch_size": 16, "dtype": "bfloat16"},
        second: {"scorer": "exact", "prompt_suffix": "", "image_mode": "processor", "max_new_tokens": 8},
    }  # fmt: skip
    return {**results, "errors": errors, "grading": grading, "strict": {first: 40.0}, "questions": {first: 50}}


def test_csv_reads_back_with_plain_minus_signs():
    rows = list(csv.reader(io.StringIO(as_csv(TABLE))))
    assert rows == [["", "Last", "BWT"], ["KeepLoRA_v1 & co", "86.0 ±0.1", "-2.5"], ["50 % | {x}", "–", "+0.3, -1.0"]]


def test_markdown_keeps_its_columns():
    lines = as_markdown(TABLE).splitlines()
    assert lines[0] == "|  | Last | BWT |" and lines[1] == "|---|---|---|"
    assert lines[2] == "| KeepLoRA_v1 & co | 86.0 ±0.1 | −2.5 |"
    assert lines[3] == "| 50 % \\| {x} | – | +0.3, −1.0 |"


def test_latex_escapes_what_it_would_take_for_commands():
    text = as_latex(TABLE)
    assert r"KeepLoRA\_v1 \& co & 86.0 $\pm$0.1 & $-$2.5 \\" in text
    assert r"50 \% \textbar{} \{x\} & -- &" in text
    assert text.startswith(r"\begin{tabular}{lrr}") and text.rstrip().endswith(r"\end{tabular}")


def test_a_run_is_exported_in_every_format(told):
    written = exported(run_tables(told))
    assert {name.rpartition(".")[2] for name in written} == {"csv", "md", "tex"}
    assert {name.rpartition(".")[0] for name in written} == {"scores", "metrics", "wrong_answers", "how_it_was_asked"}
    rows = list(csv.reader(io.StringIO(written["wrong_answers.csv"])))
    assert rows[0] == ["", "questions", "wrong", "off by one", "blank", "strict score"]
    first, second = told["domains"][:2]
    assert rows[1:] == [[first, "50", "3", "1", "0", "40.0"], [second, "–", "0", "0", "2", "–"]]
    assert "gold Yes|No: yes?; gold *: which?" in written["how_it_was_asked.csv"]


def test_the_page_says_what_went_wrong_how_it_was_asked_and_what_others_report(told):
    rows = [["this run", "1.0"], ["LoRA-FT", "2.0"]]
    page = render_html(told, published=(["", "RS"], rows))
    for text in ("Wrong answers by form", "off by one", "dcl_fin", "Beside published results", "LoRA-FT"):
        assert text in page
    plain = render_html({key: value for key, value in told.items() if key not in {"errors", "grading"}})
    assert "Wrong answers by form" not in plain and "Beside published" not in plain


FORMULAS = ["=HYPERLINK(1)", "+1+cmd|' /C calc'!A0", "-2+3+cmd", "@SUM(A1)", "\t=1", "\r=1", "＝1", "+a", "-"]
FIGURES = ["-2.5", "+0.3, -1.0", "−0.4 ±0.2", "-1", "+12.0 %", "–", "", "Answer: =1", "KeepLoRA"]


@pytest.mark.parametrize("cell", FORMULAS)
def test_a_cell_that_a_spreadsheet_would_compute_is_a_text_in_every_format(cell):
    for written in exported({"a": ([cell, "b"], [[cell, cell]])}).values():
        assert written.count("'" + cell[:1].strip("\t\r")) == 3, written
    rows = list(csv.reader(io.StringIO(as_csv(([cell], [[cell]])), newline="")))
    assert rows == [["'" + cell.replace("\r", " ")]] * 2


@pytest.mark.parametrize("cell", FIGURES)
def test_figures_and_plain_texts_stay_as_they_are(cell):
    assert list(csv.reader(io.StringIO(as_csv(([""], [[cell]]))))) == [[""], [cell.replace("−", "-")]]


def test_a_cell_of_several_lines_stays_in_its_row():
    assert len(as_markdown(([""], [["a\nb\r\nc"]])).splitlines()) == 3
    assert as_csv(([""], [["a\r=1\n=2"]])) == '""\na =1 =2\n'
    assert "a b c" in as_latex(([""], [["a\nb\r\nc"]]))
