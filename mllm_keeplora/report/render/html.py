"""Pages as single HTML files: style sheet and pictures inside, no script, no network. The templates lie beside this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mllm_keeplora.report.render import view
from mllm_keeplora.report.render.export import Table, errors_table, grading_table, minus
from mllm_keeplora.report.render.figures import data_uri, domain_curves_figure, score_matrix_figure

Drawn = tuple[bytes, bytes]  # a picture for a light page and for a dark one


class WrongAnswer(NamedTuple):
    """Show a sample that the model got wrong."""

    domain: str
    question: str
    prediction: str
    answer: str
    image_png: bytes | None = None


def render_html(
    results: view.Results,
    wrong_answers: Sequence[WrongAnswer] = (),
    diagnosed: Sequence[tuple[str, Drawn, str]] = (),
    published: Table | None = None,
) -> str:
    """Render the report of one run.

    Args:
        results: the content of results.json; what is optional there is shown where it is present, and so is `config`,
            a YAML text.
        wrong_answers: samples to show.
        diagnosed: heading, picture and note of each diagnostic.
        published: table of what others report on the same benchmark.
    """
    sheet = view.score_sheet(results)
    measured = sum(row.is_measured for row in sheet.stages)
    blind = results.get("blind_per_type") or {}
    types = [
        [domain, kind, view.score_text(score), view.score_text(blind.get(domain, {}).get(kind))]
        for domain, scores in (results.get("per_type") or {}).items()
        for kind, score in scores.items()
    ]
    return fill_page(
        "page.html",
        title=view.run_title(results),
        results=results,
        sheet=sheet,
        seconds=results.get("wall_seconds"),
        curves=in_both(lambda dark: domain_curves_figure(results, dark)) if measured > 1 else None,
        heat_map=in_both(lambda dark: score_matrix_figure([results], [""], dark)) if measured else None,
        diagnosed=diagnosed,
        errors=errors_table(results),
        asked=grading_table(results),
        published=published,
        types=(["", "", "score", "blind"], types),
        wrong_answers=wrong_answers,
    )


def in_both(draw: Callable[[bool], bytes]) -> Drawn:
    """Draw a figure, given whether the page is dark, for both kinds of page."""
    return draw(False), draw(True)


def fill_page(template: str, **values: Any) -> str:
    """Fill a template of this folder; what it puts in is escaped, and a value that is missing is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    templates = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    templates.filters |= {"data_uri": data_uri, "minus": minus}
    templates.filters |= {"duration": view.duration_text, "memory": view.memory_text}
    return templates.get_template(template).render(
        values, metrics=view.METRICS, metric_text=view.metric_text, score_text=view.score_text
    )
