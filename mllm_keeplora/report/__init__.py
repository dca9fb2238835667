"""Renders the results of a run for a terminal, a figure or a page. Reads a results dict; opens no run and no model."""

from mllm_keeplora.report.figures import data_uri, domain_curves_figure, save_png, score_matrix_figure
from mllm_keeplora.report.html import WrongAnswer, render_html
from mllm_keeplora.report.tables import compare_table, results_table

__all__ = [
    "WrongAnswer",
    "compare_table",
    "data_uri",
    "domain_curves_figure",
    "render_html",
    "results_table",
    "save_png",
    "score_matrix_figure",
]
