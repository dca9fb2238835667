"""One run as one HTML file that needs nothing else: style sheet and pictures inside, no script, no network."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from mllm_keeplora.report.render.css import CSS
from mllm_keeplora.report.render.export import Table, errors_table, grading_table, minus
from mllm_keeplora.report.render.figures import data_uri, domain_curves_figure, score_matrix_figure
from mllm_keeplora.report.render.view import (
    METRICS,
    NOT_MEASURED,
    Row,
    Sheet,
    duration_text,
    memory_text,
    metric_text,
    run_title,
    score_sheet,
    score_text,
)

Results = Mapping[str, Any]


class WrongAnswer(NamedTuple):
    """A sample the model got wrong, to be looked at."""

    domain: str
    question: str
    prediction: str
    answer: str
    image_png: bytes | None = None


def render_html(
    results: Results,
    title: str | None = None,
    wrong_answers: Sequence[WrongAnswer | tuple[Any, ...]] = (),
    more: Sequence[str] = (),
    published: Table | None = None,
) -> str:
    """Render the report of one run.

    Args:
        results: the content of results.json; `questions`, `per_type`, `config` (a dict, or YAML text) and
            `environment` (a dict) are shown where they are present.
        title: heading of the page; None = the run's name, or its strategy.
        more: further sections, already HTML, after the results.
        wrong_answers: (domain, question, prediction, answer, PNG bytes or None) of samples to show.
        published: table of what others report on the same benchmark.

    Returns:
        The text of the page.
    """
    title = run_title(results) if title is None else title
    sheet = score_sheet(results)
    parts = [
        f"<h1>{escape(title)}</h1>",
        _facts(results),
        _tiles(results),
        pair(section("Scores", _sheet_table(results, sheet)), _curves(results, sheet)),
        pair(_heat_map(results, sheet), _times(results)),
        *more,
        _mistakes(results),
        _published(results, published),
        _per_type(results),
        _samples([WrongAnswer(*sample) for sample in wrong_answers]),
        _config(results),
        _environment(results),
    ]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page from its parts; empty ones are left out."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _facts(results: Results) -> str:
    facts = "".join(
        f"<span>{key} <b>{escape(str(results[key]))}</b></span>"
        for key in ("strategy", "base", "benchmark", "seed")
        if key in results
    )
    return f'<div class="facts">{facts}</div>'


def _tiles(results: Results) -> str:
    values = [_typeset(metric_text(metric, results["metrics"].get(metric.key))) for metric in METRICS]
    tiles = "".join(
        f'<div class="tile"><div class="value">{value}</div><div class="label">{metric.label}</div>'
        f'<div class="meaning">{metric.meaning}</div></div>'
        for metric, value in zip(METRICS, values, strict=True)
    )
    return f'<div class="tiles">{tiles}</div>'


def _sheet_table(results: Results, sheet: Sheet) -> str:
    first_suite = len(sheet.domains)
    classes = ["first-suite" if j == first_suite else "" for j in range(len(sheet.columns))]
    heads = "".join(_cell("th", escape(name), classes[j]) for j, name in enumerate(sheet.columns))
    counts = results.get("questions") or {}
    body = []
    if counts:
        cells = "".join(
            _cell("td", escape(str(counts.get(name, ""))), classes[j]) for j, name in enumerate(sheet.columns)
        )
        body.append(f'<tr class="count"><th>questions</th>{cells}</tr>')
    rows = [*sheet.references, *(row for row in sheet.stages if row.is_measured)]
    for row in rows:
        is_last_reference = bool(sheet.references) and row is sheet.references[-1]
        body.append(_sheet_row(row, classes, first_suite, "last-reference" if is_last_reference else ""))
    return (
        f'<div class="scroll"><table class="sheet"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
        '<p class="note">Percent. Framed: the domain just learned. Left of the frame: domains learned before; '
        f"right of it: not yet learned. {NOT_MEASURED}: not measured.</p>"
    )


def _sheet_row(row: Row, classes: Sequence[str], num_domains: int, row_class: str) -> str:
    cells = []
    for j, score in enumerate(row.scores):
        phase = "empty" if score is None else row.phase(j, num_domains)
        share = "" if score is None else f"--share:{min(max(score, 0.0), 100.0):.1f}"
        cells.append(_cell("td", _typeset(score_text(score)), f"{phase} {classes[j]}".strip(), share))
    return f'<tr class="{row_class}"><th>{escape(row.label)}</th>{"".join(cells)}</tr>'


def _heat_map(results: Results, sheet: Sheet) -> str:
    if not any(row.is_measured for row in sheet.stages):
        return ""
    pictures = [score_matrix_figure([results], titles=[""], dark=dark) for dark in (False, True)]
    return section("Score matrix", picture("Heat map of the score matrix", *pictures), "figure")


def _curves(results: Results, sheet: Sheet) -> str:
    if sum(row.is_measured for row in sheet.stages) < 2:
        return ""
    pictures = [domain_curves_figure(results, dark=dark) for dark in (False, True)]
    note = "Dashed: before the domain is learned. Large marker: learned here. Dotted: general."
    content = picture("Score of every domain over the sequence", *pictures) + f'<p class="note">{note}</p>'
    return section("Over the sequence", content, "figure")


def picture(text: str, light: bytes, dark: bytes, wide: bool = False) -> str:
    """A figure that follows the page's colour scheme."""
    classes = ' class="wide"' if wide else ""
    return (
        f"<figure{classes}><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{data_uri(dark)}">'
        f'<img alt="{text}" src="{data_uri(light)}"></picture></figure>'
    )


def _times(results: Results) -> str:
    seconds = results.get("wall_seconds") or {}
    if not seconds:
        return ""
    longest = max(max(seconds.values()), 1e-9)
    bars = "".join(
        f'<span>{escape(stage)}</span><div class="track"><div class="bar" style="width:{100 * value / longest:.1f}%">'
        f'</div></div><span class="amount">{duration_text(value)}</span>'
        for stage, value in seconds.items()
    )
    total = f"Total {duration_text(sum(seconds.values()))}."
    if results.get("peak_memory_bytes"):
        total += f" Peak memory {memory_text(results['peak_memory_bytes'])}."
    return section("Time", f'<div class="bars">{bars}</div><p class="note">{total}</p>', "figure")


def _per_type(results: Results) -> str:
    """Tabulate {domain: {question type: score}} of the last stage beside the blind answer's."""
    per_type, blind = results.get("per_type") or {}, results.get("blind_per_type") or {}
    rows = "".join(
        f"<tr><th>{escape(domain)}</th><th>{escape(kind)}</th><td>{_typeset(score_text(score))}</td>"
        f"<td>{_typeset(score_text(blind.get(domain, {}).get(kind)))}</td></tr>"
        for domain, scores in per_type.items()
        for kind, score in scores.items()
    )
    head = "<thead><tr><th></th><th></th><th>score</th><th>blind</th></tr></thead>"
    table = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    return _details("Final score by question type", table) if rows else ""


def _mistakes(results: Results) -> str:
    """What went wrong in which form, and how each set was asked and graded."""
    wrong, asked = errors_table(results), grading_table(results)
    parts = []
    if wrong[1]:
        note = (
            "Answers of the last stage that the scorer did not take in full. Off by one: both numbers whole. Format: "
            "the answer stands in other words. Truncated: cut at the token limit. Strict: share of answers that are "
            "the gold one word by word, a second opinion beside the official rule."
        )
        parts.append(section("Wrong answers by form", html_table(wrong) + f'<p class="note">{note}</p>'))
    if asked[1]:
        parts.append(_details("How each set was asked and graded", html_table(asked)))
    return "\n".join(parts)


def _published(results: Results, table: Table | None) -> str:
    if table is None:
        return ""
    note = "Scores after the last domain, in percent; bases and settings of others may differ from this run's."
    return section("Beside published results", html_table(table) + f'<p class="note">{note}</p>')


def _samples(samples: Sequence[WrongAnswer]) -> str:
    cards = []
    for sample in samples:
        image = f'<img alt="" src="{data_uri(sample.image_png)}">' if sample.image_png else ""
        cards.append(
            f'<div class="sample">{image}<dl><dt>domain</dt><dd>{escape(sample.domain)}</dd>'
            f"<dt>question</dt><dd>{escape(sample.question)}</dd>"
            f'<dt>predicted</dt><dd class="wrong">{escape(sample.prediction) or "(empty)"}</dd>'
            f"<dt>answer</dt><dd>{escape(sample.answer)}</dd></dl></div>"
        )
    return section("Wrong answers", f'<div class="samples">{"".join(cards)}</div>') if cards else ""


def _config(results: Results) -> str:
    config = results.get("config")
    if not config:
        return ""
    if not isinstance(config, str):
        import yaml

        config = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return _details("Configuration", f"<pre>{escape(config)}</pre>")


def _environment(results: Results) -> str:
    items = "".join(
        f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>"
        for key, value in (results.get("environment") or {}).items()
    )
    return _details("Environment", f'<dl class="keys">{items}</dl>') if items else ""


def html_table(table: Table) -> str:
    """A table of heads and rows; the first cell of a row is its name."""
    heads, rows = table
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{escape(minus(cell))}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pair(*sections: str) -> str:
    """Sections side by side where there is room."""
    return f'<div class="pair">{"".join(sections)}</div>'


def section(heading: str, content: str, classes: str = "") -> str:
    """A card with a heading."""
    return f'<section class="{classes}"><h2>{heading}</h2>{content}</section>'


def _details(heading: str, content: str) -> str:
    return f"<details><summary>{heading}</summary>{content}</details>"


def _cell(tag: str, content: str, classes: str = "", style: str = "") -> str:
    attributes = (f' class="{classes}"' if classes else "") + (f' style="{style}"' if style else "")
    return f"<{tag}{attributes}>{content}</{tag}>"


def _typeset(number: str) -> str:
    """Set a number with a true minus sign and an unbreakable space."""
    return number.replace("-", "−").replace(" ", "&nbsp;")
