"""The documentation: the site builds without a fault, leaves nothing out, and what it names exists."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import pytest

from mllm_keeplora.config import RunConfig
from mllm_keeplora.runs import DomainDir, RunDir, Unit, Within
from mllm_keeplora.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
PLACE = re.compile(r"`((?:\w+/)*\w+\.py)(?:::([\w.]+))?`(?!\])")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site; a warning, such as a broken link or a page without a place among the others, is a fault."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def words(page: Path) -> set[str]:
    """What a page shows as code, word by word."""
    return set(re.findall(r"<code>([^<]+)</code>", page.read_text(encoding="utf-8")))


class Links(HTMLParser):
    """Addresses that a page loads something from or leads to."""

    def __init__(self, page: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.led_to: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "a":
            self.led_to.append(found.get("href") or "")
        elif tag in {"link", "script", "img"}:
            self.loaded.append(found.get("href") or found.get("src") or "")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_a_page_with_its_options_and_a_row_among_all(site, name):
    assert words(site / f"strategies/{name}/index.html") >= {*STRATEGIES[name].Options.model_fields}
    assert f'href="{name}/"' in (site / "strategies/index.html").read_text().split("<article")[1].split("</article")[0]


def test_every_key_of_a_run_is_in_the_tables(site):
    keys, sections = set(), 0
    for name, field in RunConfig.model_fields.items():
        own = getattr(field.annotation, "model_fields", {})
        keys |= {f"{name}.{key}" for key in own} | {name}
        sections += bool(own)
    assert words(site / "configuration/index.html") >= keys and sections >= 6


def test_no_page_is_left_out_of_the_navigation_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path.parent.relative_to(site).as_posix() for path in site.rglob("index.html")}
    places = {urljoin("/", link).strip("/") or "." for link in Links(site / "index.html").led_to if "#" not in link}
    assert pages <= places and len(pages) > 40
    for page in site.rglob("*.html"):
        assert not [link for link in Links(page).loaded if re.match(r"(\w+:)?//", link)], page


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/**/*.md")))
def test_files_and_names_that_a_page_gives_exist(page):
    for file, name in PLACE.findall((ROOT / page).read_text(encoding="utf-8")):
        home = next((path for path in (ROOT / file, ROOT / "mllm_keeplora" / file) if path.is_file()), None)
        assert home is not None, f"{page}: {file}"
        assert not name or has(ast.parse(home.read_text(encoding="utf-8")), name.split(".")), f"{page}: {file}::{name}"


def has(tree: ast.AST, path: list[str]) -> bool:
    """Whether a module defines a function, class or value, or a class's method by its dotted name."""
    first, *rest = path
    for node in ast.iter_child_nodes(tree):
        names = [getattr(node, "name", None)]
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names += [each.id for each in targets if isinstance(each, ast.Name)]
        if first in names:
            return not rest or has(node, rest)
    return False


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_repository_lead_to_files(page):
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_file_of_a_run_is_told():
    """Those that the run directory has paths for; of answers and of a training's own folder by example."""
    run, told = RunDir("run"), (ROOT / "docs/run-directory.md").read_text(encoding="utf-8")
    folder = run.folder(Unit(1, "RS", ("RS",)))
    paths = [Path(each.name) for each in vars(RunDir).values() if isinstance(each, Within)]
    own = [getattr(folder, name) for name, each in vars(DomainDir).items() if isinstance(each, Within)]
    paths += [path.relative_to(folder.path) for path in own if folder.checkpoints not in path.parents]
    assert len(paths) >= 15 and not [path for path in paths if f"`{path}`" not in told and f"`{path}/`" not in told]
