"""Renders the results of runs for a terminal, a figure or a page. Reads results dicts; opens no run and no model."""

from mllm_keeplora.report.render.comparison import finals, heat_maps, paired, render_comparison, summary
from mllm_keeplora.report.render.costs import costs
from mllm_keeplora.report.render.diagnostics import UnitFacts
from mllm_keeplora.report.render.export import Table, as_markdown, exported, run_tables
from mllm_keeplora.report.render.figures import data_uri, domain_curves_figure, save_png, score_matrix_figure
from mllm_keeplora.report.render.groups import Group, group_runs, split_of, trade_off_curves
from mllm_keeplora.report.render.html import WrongAnswer, render_html
from mllm_keeplora.report.render.inspection import inspection, inspection_sections
from mllm_keeplora.report.render.tables import compare_table, memory_table, results_table
from mllm_keeplora.report.render.trade_off import trade_off_figure

__all__ = [
    "Group",
    "Table",
    "UnitFacts",
    "WrongAnswer",
    "as_markdown",
    "compare_table",
    "costs",
    "data_uri",
    "domain_curves_figure",
    "exported",
    "finals",
    "group_runs",
    "heat_maps",
    "inspection",
    "inspection_sections",
    "memory_table",
    "paired",
    "render_comparison",
    "render_html",
    "results_table",
    "run_tables",
    "save_png",
    "score_matrix_figure",
    "split_of",
    "summary",
    "trade_off_curves",
    "trade_off_figure",
]
