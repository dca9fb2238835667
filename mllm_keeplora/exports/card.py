"""The README of an exported checkpoint: what it is, what it has learnt, how well it answers, how it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from mllm_keeplora.eval.saved import SavedRun
from mllm_keeplora.models.base import family_of
from mllm_keeplora.models.shipped import hub_id, resolve
from mllm_keeplora.system import files

PIPELINES = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
}
LOAD = {
    "transformers": """from transformers import {auto}, AutoProcessor

model = {auto}.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
""",
    "peft": """from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained({base})
model = PeftModel.from_pretrained(base, ".")
""",
}


def model_card(saved: SavedRun, after: int, content: str, library: str) -> str:
    """Write Markdown with the front matter that model hubs read.

    Args:
        saved: the run that is exported.
        after: how many of its units the checkpoint has learnt.
        content: what the folder holds.
        library: `transformers` or `peft`.
    """
    config, public = saved.config, hub_id(saved.config.base.model)
    name = public or Path(config.base.model).name  # a folder of this machine means nothing elsewhere
    domains = ", ".join(domain for unit in saved.run.units[:after] for domain in unit.domains) or "no domain"
    scores = _scores(saved, after)
    front = {"base_model": public} if public is not None else {}
    family = family_of(config.base, resolve(config.base))
    front |= {"library_name": library, "pipeline_tag": PIPELINES[family.auto]}
    parts = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---"]),
        f"# {config.name}",
        f"`{name}` after {domains}, learnt one after another by `{config.strategy.name}`\n"
        f"(mllm_keeplora). This folder holds {content}.",
    ]
    if config.base.quantization is not None:
        parts.append(f"It was learnt beside weights quantised as {config.base.quantization}; these are not quantised.")
    if scores:
        parts += [
            "\n".join(["| set | score |", "|---|---|", *(f"| {key} | {value:.1f} |" for key, value in scores.items())]),
            f"In percent, by the scorers of `{saved.benchmark.name}`: the run's own scores, before its weights were\n"
            "rounded to what is stored here.",
        ]
    if lists := _class_lists(saved):
        parts += ["A picture is compared with the classes of its data set, by these texts:", lists]
    parts.append("```python\n" + LOAD[library].format(base=json.dumps(name), auto=family.auto) + "```")
    parts += ["Settings of the run:", "```json\n" + json.dumps(config.result_defining(), indent=1) + "\n```"]
    return "\n\n".join(parts) + "\n"


def _class_lists(saved: SavedRun) -> str:
    """List the domains' classes and what they are told by; empty of a run that asks questions."""
    lines = []
    for name in saved.benchmark.domains:
        if (naming := saved.benchmark.naming(name)) is not None:
            texts = ", ".join(json.dumps(each[0]) for each in naming.classes.texts)
            lines.append(f"- {name}: {texts}")
    return "\n".join(lines)


def _scores(saved: SavedRun, after: int) -> dict[str, float]:
    """Read the scores of domains and suites after so many units, where they were measured."""
    path = saved.run.path / "results.json"
    if not path.is_file():
        return {}
    results = files.read_json(path, files.OBJECT)
    learnt = sum(len(unit.domains) for unit in saved.run.units[:after])
    row = results["score_matrix"][learnt - 1] if after else results["zero_shot"]
    found = dict(zip(results["domains"], row, strict=False))
    found |= {name: values[after] for name, values in results["general"].items() if after < len(values)}
    return {name: value for name, value in found.items() if value is not None}
