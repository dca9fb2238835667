import base64
import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mllm_keeplora.report.render import figures
from mllm_keeplora.report.render.figures import (
    _colour_scale,
    _spread,
    data_uri,
    domain_curves_figure,
    draw_cell,
    score_matrix_figure,
)
from mllm_keeplora.report.render.trade_off import curve_style

HEAVY = {"matplotlib", "torch", "yaml", "pandas", "numpy", "jinja2"}


def cut(results, num_domains=2):
    """Keep the first domains only: drawing takes longer the more cells there are."""
    results["domains"] = results["domains"][:num_domains]
    results["score_matrix"] = [row[:num_domains] for row in results["score_matrix"][:num_domains]]
    results |= {"zero_shot": results["zero_shot"][:num_domains], "blind": results["blind"][:num_domains]}
    results["general"] = {name: series[: num_domains + 1] for name, series in results["general"].items()}
    return results


@pytest.fixture
def results(results):
    return cut(results)


@pytest.fixture
def finetune_results(finetune_results):
    return cut(finetune_results)


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    monkeypatch.setattr(figures, "DPI", 40)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def test_heat_maps_of_several_runs_are_wider_than_one(results, finetune_results):
    one, two = (
        pixels(score_matrix_figure([results], ["a"])),
        pixels(score_matrix_figure([results, finetune_results], ["a", "b"])),
    )
    assert two.shape[1] > 1.6 * one.shape[1]
    assert two.shape[0] == one.shape[0]


def test_a_heat_map_depends_on_scores_and_on_what_was_measured(results):
    drawn = [score_matrix_figure([results], ["a"])]
    results["score_matrix"][0][1] = None
    drawn.append(score_matrix_figure([results], ["a"]))
    results["score_matrix"][0][1] = 0.0
    drawn.append(score_matrix_figure([results], ["a"]))
    assert len(set(drawn)) == 3


def test_the_same_results_give_the_same_bytes(results):
    assert domain_curves_figure(results) == domain_curves_figure(results)


@pytest.mark.parametrize(
    "draw", [lambda r, d: score_matrix_figure([r], ["a"], d), lambda r, d: domain_curves_figure(r, dark=d)]
)
def test_dark_figures_are_transparent_and_light_ones_are_white(results, draw):
    assert pixels(draw(results, True))[0, 0, 3] == 0
    assert tuple(pixels(draw(results, False))[0, 0]) == (255, 255, 255, 255)


def test_curves_of_a_run_on_seen_domains_without_references_can_be_drawn(finetune_results):
    finetune_results |= {"zero_shot": None, "blind": None, "general": None}
    assert pixels(domain_curves_figure(finetune_results)).shape[0] > 100


def test_a_run_without_any_score_yet_can_be_drawn(results):
    results |= {"score_matrix": [[None] * 2] * 2, "zero_shot": None, "blind": None, "general": None}
    assert pixels(score_matrix_figure([results], ["a"])).size and pixels(domain_curves_figure(results)).size


def test_only_a_cell_that_was_not_measured_is_hatched(results):
    colours = _colour_scale([])
    for score, hatch in ((None, "////"), (0.0, None)):
        axes = Figure().subplots()
        draw_cell(axes, (0.0, 0.0), score, colours, dark=False)
        assert [patch.get_hatch() for patch in axes.patches] == [hatch]


@pytest.mark.parametrize("num_domains", [1, 9])
def test_short_and_long_sequences_can_be_drawn(results, num_domains):
    results |= {
        "domains": [f"StanfordCars{k}" for k in range(num_domains)],
        "score_matrix": [[110.0] * num_domains] * num_domains,
        "zero_shot": [50.0] * num_domains,
        "blind": None,
        "general": {},
    }
    assert pixels(score_matrix_figure([results], ["a"])).size and pixels(domain_curves_figure(results)).size


def test_a_name_with_dollar_signs_is_no_formula(results):
    results["domains"][0] = "$\\frac{$"
    assert pixels(score_matrix_figure([results], ["$\\frac{$"])).size and pixels(domain_curves_figure(results)).size


def test_crowded_labels_move_apart_around_their_mean():
    assert _spread([10.0, 50.0, 51.0], 5.0) == pytest.approx([10.0, 48.0, 53.0])
    assert _spread([10.0, 14.0, 18.0, 19.0], 4.0) == pytest.approx([9.25, 13.25, 17.25, 21.25])


def test_two_dozen_curves_differ_in_two_ways_from_each_other():
    styles = [curve_style(i) for i in range(24)]
    for i, one in enumerate(styles):
        for other in styles[:i]:
            assert sum(one[key] != other[key] for key in one) >= 2, (one, other)


def test_a_figure_can_be_inlined(results):
    png = domain_curves_figure(results)
    head, payload = data_uri(png).split(",")
    assert head == "data:image/png;base64" and base64.b64decode(payload) == png


def test_importing_the_report_imports_nothing_heavy():
    modules = "comparison, diagnostics, export, html, tables"
    code = f"import sys; from mllm_keeplora.report.render import {modules}; print({HEAVY} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("figure", [score_matrix_figure, domain_curves_figure])
def test_sixty_domains_are_drawn_no_larger_than_they_can_be_looked_at(results, figure, recwarn):
    count = 60
    results["domains"] = [f"D{number}" for number in range(count)]
    results["score_matrix"] = [[float(i)] * count for i in range(count)]
    results |= {"zero_shot": [0.0] * count, "blind": [0.0] * count, "general": {}}
    height, width = pixels(figure(*(([results], [""]) if figure is score_matrix_figure else [results]))).shape[:2]
    assert width <= 15 * figures.DPI and height <= 12 * figures.DPI
    assert not [warning for warning in recwarn if "constrained_layout" in str(warning.message)]
