"""Pages of the site that are made from the code: strategies, option tables, the changelog. A hook of mkdocs.

Pages in docs/ can be read where they are, too: a link to a file outside of docs/ becomes one to the page that is made
of that file, or plain text; a line `<!-- made: NAME -->` is where a table goes.
"""

from __future__ import annotations

import inspect
import json
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from mkdocs.structure.files import File
from pydantic import BaseModel

from mllm_keeplora.config import RunConfig, shipped
from mllm_keeplora.data.benchmarks import Benchmark, Domain, Suite
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.metrics.scorers import SCORERS
from mllm_keeplora.strategies import STRATEGIES, Strategy
from mllm_keeplora.sweeps.plan import FinalConfig, SweepConfig, TuneConfig

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s]+)\)")
COMMENT = re.compile(r"^    (\w+): .*?  # (.+)$", re.M)  # behind an option
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}


# -- what mkdocs calls -----------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Give every strategy its place among the pages."""
    for section in config["nav"]:
        if "Strategies" in section:
            section["Strategies"] += [{name: f"strategies/{name}.md"} for name in STRATEGIES]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made."""
    pages = {f"strategies/{name}.md": strategy_page(name) for name in STRATEGIES}
    pages["changelog.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put tables where a page asks for them, list the runs of evidence, and turn links to files into links to pages."""
    path = page.file.src_uri
    text = re.sub(r"<!-- made: (\w+) -->", lambda match: TABLES[match[1]](), markdown)
    if path.startswith("evidence/") and path.endswith("/README.md"):
        text += runs_below(ROOT / "docs" / posixpath.dirname(path))
    return LINK.sub(lambda match: linked(match[1], match[2], path), text)


# -- links -----------------------------------------------------------------------------------------------------------


def linked(text: str, link: str, path: str) -> str:
    """A link of a page as it is on the site: to a page, or plain text where the file that it leads to has none.

    Raises:
        ValueError: it leads to a file of the repository that does not exist.
    """
    place = posixpath.normpath(posixpath.join("docs", posixpath.dirname(path), link.partition("#")[0]))
    if place.startswith("docs/"):
        return f"[{text}]({link})"
    if not (ROOT / place).exists():
        raise ValueError(f"docs/{path} links to {place}, which does not exist")
    made = {source_of(strategy): f"strategies/{name}.md" for name, strategy in STRATEGIES.items()}
    made |= {"CHANGELOG.md": "changelog.md", "README.md": "index.md"}
    return f"[{text}]({posixpath.relpath(made[place], posixpath.dirname(path) or '.')})" if place in made else text


def source_of(strategy: type) -> str:
    """A class's file, relative to the repository."""
    return f"{strategy.__module__.replace('.', '/')}.py"


def runs_below(folder: Path) -> str:
    """A list of the runs in a folder of evidence, each with its settings and its results."""
    found = sorted(path.parent.relative_to(folder) for path in folder.glob("*/*/results.json"))
    found += sorted(path.parent.relative_to(folder) for path in folder.glob("*/results.json"))
    lines = [f"- `{run}`: [settings]({run}/config.yaml), [results]({run}/results.json)" for run in found]
    return "\n".join(["", "", "## The runs", "", *lines, ""]) if found and folder.name != "evidence" else ""


# -- strategies ------------------------------------------------------------------------------------------------------


def strategy_page(name: str) -> str:
    """A strategy's page: the head of its file, how the sequence drives it, its options."""
    strategy = STRATEGIES[name]
    first, _, rest = (sys.modules[strategy.__module__].__doc__ or "").partition("\n")
    run = "mini_dcl" if name == "keeplora" else f"mini_dcl_{name}"
    started = run if run in shipped("runs") else f"mini_dcl strategy.name={name} output=runs/{name}"
    parts = [
        f"# {name}",
        f"**{prose(first)}**",
        prose(rest.strip("\n")),
        f"```bash\nmllm-keeplora run {started}\n```",
        "## How the sequence drives it",
        table(("", ""), driven(strategy)),
        "## Options",
        options_of(strategy.Options),
    ]
    if strategy.presets:
        parts += ["## Presets", "`strategy.preset` lays these under what a run sets itself."]
        parts += [f"**`{preset}`**: " + ", ".join(f"`{key}={json.dumps(value)}`" for key, value in values.items())
                  for preset, values in strategy.presets.items()]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def driven(strategy: type[Strategy]) -> Iterator[tuple[str, str]]:
    """What a strategy declares, in words."""
    streams = {"sequential": "one domain after the other", "union": "all domains at once", "none": "nothing is trained"}
    starts = {"previous": "the model after the domain before", "base": "the untouched base"}
    answers = {
        "merge": "everything merged into one model",
        "sum": "a weighted sum of all branches, merged",
        "gate": "branches weighed by the question; they stay live",
        "route": "the branch that a router picks for the question; all stay live",
        "oracle": "the branch of the domain, which must be told",
    }
    hooks = ("prepare", "before_domain", "batch", "extra_loss", "around_step", "after_domain")
    own = [hook for hook in hooks if getattr(strategy, hook) is not getattr(Strategy, hook)]
    needs = sorted(strategy(strategy.Options()).needs)
    yield "file", f"`{source_of(strategy)}`"
    if strategy.__doc__ != Strategy.__doc__:
        yield "storage", prose(inspect.cleandoc(strategy.__doc__ or ""))
    yield "learns", streams[strategy.stream]
    yield "starts from", starts[strategy.start_from]
    yield "answers with", answers[strategy.combine]
    yield "hooks", ", ".join(f"`{hook}`" for hook in own)
    yield "needs", ", ".join(f"`{need}`" for need in needs) or "nothing that DeepSpeed takes away"


# -- tables of options -----------------------------------------------------------------------------------------------


def options_of(model: type[BaseModel], prefix: str = "") -> str:
    """A model's docstring and one row for each of its keys."""
    schema = model.model_json_schema(mode="validation")
    comments: dict[str, str] = {}
    for each in reversed([each for each in model.__mro__ if issubclass(each, BaseModel) and each is not BaseModel]):
        comments |= dict(COMMENT.findall(inspect.getsource(each)))
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else value_text(field.get("default", ""))
        meaning = prose(field.get("description") or comments.get(name, ""))
        fixed = "may change when the run is continued" if field.get("runtime") else ""
        rows.append((f"`{prefix}{name}`", kind_of(field, schema), default, "; ".join(filter(None, (meaning, fixed)))))
    own = vars(model).get("__doc__") or ""
    return "\n\n".join([prose(inspect.cleandoc(own)), table(("key", "values", "default", ""), rows)]).strip()


def kind_of(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a key may be set to, in words."""
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1].removesuffix("Config").lower()
        return f"[see {name}](#{name})"
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(kind_of(each, schema) for each in field["anyOf"]))
    if field.get("type") == "array":
        return f"list: {kind_of(field.get('items', {}), schema)}"
    if field.get("type") == "object":
        return "keys and values"
    bounds = [f"{sign} {field[key]:g}" for key, sign in BOUNDS.items() if key in field]
    return " ".join([KINDS.get(field.get("type", ""), "any"), ", ".join(bounds)]).strip()


def value_text(value: Any) -> str:
    """A default as it is written in YAML; nothing for what is empty, or a section with defaults of its own."""
    if isinstance(value, dict) or value in ([], ""):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`{{.whole}}"


def sections() -> str:
    """Every section of a run's config: its keys, then a table for each section below it."""
    own = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    own = {name: kind for name, kind in own.items() if isinstance(kind, type) and issubclass(kind, BaseModel)}
    own["per_domain"] = get_args(RunConfig.model_fields["per_domain"].annotation)[1]
    parts = ["## A run", options_of(RunConfig)]
    for name, kind in own.items():
        parts += [f"## {name}", options_of(kind, f"{name}." if name != "per_domain" else "per_domain.DOMAIN.")]
    return "\n\n".join(parts)


def sweep_sections() -> str:
    parts = [options_of(SweepConfig)]
    for name, kind in {"tune": TuneConfig, "final": FinalConfig}.items():
        parts += [f"#### {name}", options_of(kind, f"{name}.")]
    return "\n\n".join(parts)


def benchmark_sections() -> str:
    kinds = {"Benchmark": Benchmark, "Domain": Domain, "Suite": Suite, "VideoOptions": VideoOptions}
    return "\n\n".join(f"### {title}\n\n{options_of(kind)}" for title, kind in kinds.items())


def scorers() -> str:
    """Every scoring rule by name, with the first sentence of its function."""
    rows = []
    for name, rule in SCORERS.items():
        told = (inspect.getdoc(rule) or "").partition("\n")[0]
        rows.append((f"`{name}`", prose(told), f"`{rule.__module__.replace('.', '/')}.py`"))
    return table(("name", "what it does", "file"), rows)


TABLES = {
    "configuration": sections,
    "sweeps": sweep_sections,
    "benchmark": benchmark_sections,
    "scorers": scorers,
}


# -- text ------------------------------------------------------------------------------------------------------------


def table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("\n", " ").replace("|", "\\|") for cell in row) + " |" for row in lines
    )


def prose(text: str) -> str:
    """A docstring as Markdown: what stands within backticks or indented stays, all else is meant as it is written."""

    def escaped(line: str) -> str:
        if line.startswith("    "):
            return line
        parts = line.split("`")
        return "`".join(
            re.sub(r"([*_<\[])", r"\\\1", part) if number % 2 == 0 else part for number, part in enumerate(parts)
        )

    return "\n".join(escaped(line) for line in text.replace("\nSource:", "\n\nSource:").splitlines())
