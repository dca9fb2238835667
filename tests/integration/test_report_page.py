"""The report as a browser shows it: every picture is there and not blank, nothing is fetched, nothing overflows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

DRAWN = True  # see conftest.py
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; scripts/setup.sh dev tells how")
MEASURE = """
<script>
addEventListener("load", () => {
  const pictures = [...document.images].map(image => {
    const canvas = document.createElement("canvas");
    canvas.width = 64; canvas.height = 64;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, 64, 64);
    const pixels = context.getImageData(0, 0, 64, 64).data, colours = new Set();
    for (let i = 0; i < pixels.length; i += 4) colours.add(pixels.slice(i, i + 4).join());
    const box = image.getBoundingClientRect();
    return {alt: image.alt, width: box.width, height: box.height, right: box.right, colours: colours.size};
  });
  const told = {pictures, width: innerWidth, content: document.documentElement.scrollWidth,
                fetched: performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:")).length};
  document.body.setAttribute("data-told", JSON.stringify(told));
});
</script>
"""


def browse(page: Path, *options: str) -> str:
    """Headless Chromium without network; what it prints."""
    quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=10000"]
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run([CHROMIUM, *quiet, *offline, *options, page.as_uri()], capture_output=True, timeout=900)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


def measured(report: Path, folder: Path, width: int) -> dict:
    """What the page says about itself in a frame of a width."""
    inner, outer = folder / "inner.html", folder / "outer.html"
    text = report.read_text("utf-8")
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert free != text, "the page's policy would keep the measure from running"
    inner.write_text(free.replace("</body>", f"{MEASURE}</body>"), encoding="utf-8")
    outer.write_text(f'<iframe id="f" src="inner.html" style="width:{width}px;height:900px;border:0"></iframe>'
                     '<script>addEventListener("load", () => setTimeout(() => document.body.setAttribute("data-told",'
                     'f.contentDocument.body.getAttribute("data-told")), 500))</script>')  # fmt: skip
    dom = browse(outer, "--dump-dom", "--allow-file-access-from-files", "--window-size=1400,1000")
    return json.loads(re.search(r'data-told="([^"]*)"', dom)[1].replace("&quot;", '"'))


@pytest.fixture(scope="module")
def page(three, tmp_path_factory) -> Path:
    from mllm_keeplora.eval.saved import load_run
    from mllm_keeplora.report.page import refresh_results

    run = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(three, run)
    refresh_results(load_run(run))
    return run / "report.html"


@pytest.mark.parametrize("width", [1280, 400])
def test_every_figure_is_shown_and_nothing_runs_off_the_side(width, page, tmp_path):
    told = measured(page, tmp_path, width)
    assert told["width"] == width and told["content"] <= width, told
    assert told["fetched"] == 0
    figures = {picture["alt"]: picture for picture in told["pictures"] if picture["alt"]}
    wanted = ("Heat map of the score matrix", "Score of every domain over the sequence", "Capacity", "Gradient",
              "Interference", "Overlap", "Update by depth")  # fmt: skip
    assert set(wanted) <= set(figures)
    for picture in told["pictures"]:
        assert picture["colours"] > 5 and picture["width"] > 40 and picture["height"] > 40, picture
        assert picture["right"] <= width, picture


def test_a_screenshot_of_the_page_is_not_blank(page, tmp_path):
    shot = tmp_path / "page.png"
    browse(page, f"--screenshot={shot}", "--window-size=1280,2600")
    with Image.open(shot) as picture:
        assert picture.size == (1280, 2600)
        tiles = [picture.convert("L").crop((0, top, 1280, top + 400)).getextrema() for top in (0, 400, 800, 1200)]
    assert all(high - low > 100 for low, high in tiles), tiles
