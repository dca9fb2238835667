import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from mllm_keeplora.report.render import html
from mllm_keeplora.report.render.html import WrongAnswer, render_html

VOID = {"meta", "img", "source"}
HOSTILE = "<script>alert('x')</script>\" & co"


class Outline(HTMLParser):
    """Collects tags, attributes and text; fails on a tag that is closed out of order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def quick_figures(monkeypatch, picture):
    """Put a tiny picture in place of every figure: drawing them takes most of the time of a page."""
    monkeypatch.setattr(html, "score_matrix_figure", lambda *args, **kwargs: picture)
    monkeypatch.setattr(html, "domain_curves_figure", lambda *args, **kwargs: picture)


quick = pytest.mark.usefixtures("quick_figures")


def test_the_page_stands_alone(results, picture):
    page = render_html(results, wrong_answers=[WrongAnswer("RS", "q", "p", "a", picture)])
    outline = Outline(page)
    sources = [value for name, value in outline.attributes if name in {"src", "srcset", "href"}]
    assert len(sources) == 5  # two figures, each light and dark, and one sample
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "script" not in outline.tags and "link" not in outline.tags
    bare = re.sub(r"data:image/png;base64,[^\"]*", "", page).replace("http-equiv", "")
    assert "http" not in bare and "@import" not in page


@quick
def test_the_page_shows_scores_metrics_times_config_and_environment(results):
    page = render_html(results)
    for text in (
        "mini-keeplora",
        "tiny-llava",
        "mini_dcl",
        "−2.7",
        "95.4 %",
        "3 min 12 s",
        "1.3 GiB",
        "2 threads",
    ):
        assert text in page
    assert "rank: 16" in page and "<summary>Configuration</summary>" in page
    rows = re.findall(r"<th>(after [^<]*)</th>((?:<td[^>]*>[^<]*</td>)+)", page)
    assert [re.findall(r">([^<]+)</td>", cells)[:5] for _, cells in rows] == [
        [f"{score:.1f}" for score in row] for row in results["score_matrix"]
    ]
    assert page.count('class="learned"') == 5


@quick
def test_everything_from_outside_is_escaped(results, picture):
    results |= {key: HOSTILE for key in ("name", "strategy", "base", "benchmark", "seed")}
    results["domains"][0] = HOSTILE
    results["general"] = {HOSTILE: [1.0] * 6}
    results["questions"] = {HOSTILE: HOSTILE}
    results["wall_seconds"] = {HOSTILE: 1.0}
    results["environment"] = {HOSTILE: HOSTILE}
    results["config"] = HOSTILE
    results["per_type"] = {HOSTILE: {HOSTILE: 1.0}}
    page = render_html(results, [WrongAnswer(HOSTILE, HOSTILE, HOSTILE, HOSTILE, picture)])
    outline = Outline(page)
    assert "script" not in outline.tags
    shown = "".join(outline.text).count("alert(")
    assert shown >= 20


@quick
def test_optional_parts_are_left_out_when_there_is_nothing_to_show(results):
    for key in (
        "environment",
        "config",
        "questions",
        "per_type",
        "wall_seconds",
        "peak_memory_bytes",
        "general",
        "name",
    ):
        del results[key]
    page = render_html(results | {"blind": None, "zero_shot": None})
    Outline(page)
    assert "<h1>keeplora</h1>" in page
    for text in ("Configuration", "Environment", "Time", "Wrong answers", "question type", ">questions<", ">blind<"):
        assert text not in page


@quick
def test_a_cell_that_was_not_measured_is_marked_empty(finetune_results):
    page = render_html(finetune_results)
    assert len(re.findall(r'<td class="empty"[^>]*>–</td>', page)) == 10


@quick
def test_a_single_measured_row_has_no_curves(results):
    results["score_matrix"][:4] = [[None] * 5] * 4
    results["general"] = {"general": [82.4, 78.6]}
    page = render_html(results)
    assert "Over the sequence" not in page and "Heat map" in page


@quick
def test_an_empty_prediction_is_shown_as_such_and_a_sample_needs_no_picture(results):
    page = render_html(results, [WrongAnswer("RS", "How many?", "", "two")])
    assert "(empty)" in page and "How many?" in page


@quick
def test_a_config_given_as_text_is_shown_as_it_is(results):
    assert "<pre>a: 1  # why</pre>" in render_html(results | {"config": "a: 1  # why"})


@quick
def test_a_set_whose_questions_were_not_counted_has_an_empty_cell(results):
    page = render_html(results | {"questions": {"RS": 7}})
    assert "<th>questions</th><td>7</td><td></td>" in page


@quick
def test_the_page_lets_nothing_in_whatever_names_and_answers_say(results, picture):
    hostile = ["<script>alert(1)</script>", "javascript:alert(1)", '"><img src=x onerror=alert(1)>', "=HYPERLINK(1)"]
    names = dict(zip(results["domains"], hostile, strict=False))
    results = {**results, "domains": [names.get(name, name) for name in results["domains"]], "name": hostile[2]}
    answers = [WrongAnswer(text, text, text, text, picture) for text in hostile]
    page = render_html({**results, "config": hostile[0]}, wrong_answers=answers)
    outline = Outline(page)
    [policy] = [value for name, value in outline.attributes if name == "content" and "default-src" in value]
    assert "default-src 'none'" in policy and "script-src" not in policy and ("http-equiv", "Content-Security-Policy") in outline.attributes  # fmt: skip # noqa: E501
    assert "script" not in outline.tags and not [name for name, _ in outline.attributes if name.startswith("on")]
    addresses = [value for name, value in outline.attributes if name in {"src", "srcset", "href", "action"}]
    assert addresses and all(value.startswith("data:image/png;base64,") for value in addresses)
    assert hostile[0] in outline.text and hostile[1] in outline.text
