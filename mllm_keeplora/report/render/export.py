"""Tables as text for other programs: CSV, Markdown, LaTeX. A table is its heads and its rows of cells.

Names come from whoever wrote a benchmark or a results file, so no cell is a formula.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping

from mllm_keeplora.report.render.view import METRICS, NOT_MEASURED, Results, metric_text, score_sheet, score_text

Table = tuple[list[str], list[list[str]]]
FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # what cells begin with that spreadsheets compute
NUMBERS = re.compile(r"[-+−]?\d[\d\s.,±%+−-]*")  # a figure, with its spread, or several of them
FORMS = ("wrong", "off_by_one", "format", "truncated", "blank")
LATEX = str.maketrans({
    "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "±": r"$\pm$", "−": r"$-$",
    "–": "--", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}",
    "|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}",
})  # fmt: skip


def run_tables(results: Results) -> dict[str, Table]:
    """Give the tables of one run by title: scores, metrics, errors, and how each set was asked and graded."""
    sheet = score_sheet(results)
    scores = [[row.label, *map(score_text, row.scores)] for row in sheet.measured]
    values = [[metric.label, metric_text(metric, results["metrics"].get(metric.key))] for metric in METRICS]
    tables = {
        "Scores": (["", *sheet.columns], scores),
        "Metrics": (["metric", "value"], values),
        "Wrong answers": errors_table(results),
        "How it was asked": grading_table(results),
    }
    return {title: table for title, table in tables.items() if table[1]}


def errors_table(results: Results) -> Table:
    """Count, for each set, what was asked and what went wrong in which form, beside the strict second opinion."""
    errors, counts, strict = (results.get(key) or {} for key in ("errors", "questions", "strict"))
    forms = [form for form in FORMS if any(form in found for found in errors.values())]
    rows = []
    for name, found in errors.items():
        wrong = (str(found.get(form, 0)) for form in forms)
        rows.append([name, str(counts.get(name, NOT_MEASURED)), *wrong, score_text(strict.get(name))])
    return ["", "questions", *(form.replace("_", " ") for form in forms), "strict score"], rows


def grading_table(results: Results) -> Table:
    """List, for each set, its scorer, how questions and pictures are put, answer length, batch and precision."""
    grading = results.get("grading") or {}
    heads = ["", "scorer", "appended to the question", "pictures", "new tokens", "batch", "precision"]
    rows = []
    for name, told in grading.items():
        suffix = told.get("prompt_suffix") or ""
        if isinstance(suffix, Mapping):
            suffix = "; ".join(f"gold {golds}: {text.strip()}" for golds, text in suffix.items())
        cells = [told.get(key) for key in ("image_mode", "max_new_tokens", "batch_size", "dtype")]
        texts = (NOT_MEASURED if cell is None else str(cell) for cell in cells)
        rows.append([name, told.get("scorer", NOT_MEASURED), " ".join(suffix.split()) or NOT_MEASURED, *texts])
    return heads, rows


def as_csv(table: Table) -> str:
    """Write a table as comma-separated values; minus signs are plain, so that a spreadsheet reads numbers."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_in_one_line(inert(cell.replace("−", "-"))) for cell in row] for row in [table[0], *table[1]])
    return text.getvalue()


def as_markdown(table: Table) -> str:
    """Write a table as Markdown."""
    heads, *rows = (
        f"| {' | '.join(_in_one_line(minus(inert(cell))).replace('|', chr(92) + '|') for cell in row)} |"
        for row in [table[0], *table[1]]
    )
    return "\n".join([heads, f"|{'---|' * len(table[0])}", *rows]) + "\n"


def as_latex(table: Table) -> str:
    """Write a table as a `tabular` with rules of the package booktabs: text left, numbers right."""
    heads, rows = (
        [" & ".join(_in_one_line(minus(inert(cell))).translate(LATEX) for cell in row) + r" \\" for row in part]
        for part in ([table[0]], table[1])
    )
    columns = "l" + "r" * (len(table[0]) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *heads, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


FORMATS: dict[str, Callable[[Table], str]] = {"csv": as_csv, "md": as_markdown, "tex": as_latex}


def exported(tables: Mapping[str, Table]) -> dict[str, str]:
    """Write every table in every format; gives the texts by file name."""
    return {
        f"{title.lower().replace(' ', '_')}.{suffix}": write(table)
        for title, table in tables.items()
        for suffix, write in FORMATS.items()
    }


def inert(cell: str) -> str:
    """Put an apostrophe before a cell that a spreadsheet would take for a formula and that is no number."""
    return f"'{cell}" if cell.startswith(FORMULA) and not NUMBERS.fullmatch(cell) else cell


def _in_one_line(cell: str) -> str:
    return " ".join(cell.splitlines())


def minus(cell: str) -> str:
    """Put true minus signs into a cell of numbers."""
    return cell.replace("-", "−") if cell[:1] in "+-" and cell[1:2].isdigit() else cell
