"""The README of an exported checkpoint: what it is, what it has learnt, how well it answers, how it is loaded."""

from __future__ import annotations

import json

from mllm_keeplora.eval.saved import SavedRun
from mllm_keeplora.models.shipped import resolve
from mllm_keeplora.system import files

LOAD = {
    "transformers": """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
""",
    "peft": """from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained({base})
model = PeftModel.from_pretrained(base, ".")
""",
}


def model_card(saved: SavedRun, after: int, content: str, library: str) -> str:
    """Markdown with the front matter that model hubs read.

    Args:
        saved: the run that is exported.
        after: how many of its units the checkpoint has learnt.
        content: what the folder holds.
        library: `transformers` or `peft`.
    """
    config, learnt = saved.config, saved.run.units[:after]
    name = resolve(config.base)
    front = {"base_model": name, "library_name": library, "pipeline_tag": "image-text-to-text"}
    domains = [domain for unit in learnt for domain in unit.domains]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", "", f"# {config.name}", ""]
    lines += [
        f"`{name}` after {', '.join(domains) or 'no domain'}, learnt one after another by `{config.strategy.name}`"
    ]
    lines += [f"(mllm_keeplora). This folder holds {content}.", ""]
    if config.base.quantization is not None:
        lines += [f"It was learnt beside weights quantised as {config.base.quantization}; these are not quantised.", ""]
    scores = _scores(saved, after)
    if scores:
        lines += ["| set | score |", "|---|---|", *(f"| {key} | {value:.1f} |" for key, value in scores.items()), ""]
        lines += [
            f"In percent, by the scorers of `{saved.benchmark.name}`: the run's own scores, before its weights were"
        ]
        lines += ["rounded to what is stored here.", ""]
    lines += ["```python", LOAD[library].format(base=json.dumps(name)).strip(), "```", ""]
    lines += ["Settings of the run:", "", "```json", json.dumps(config.result_defining(), indent=1), "```", ""]
    return "\n".join(lines)


def _scores(saved: SavedRun, after: int) -> dict[str, float]:
    """Scores of domains and suites after so many units, where they were measured."""
    path = saved.run.path / "results.json"
    if not path.is_file():
        return {}
    results = files.read_json(path)
    learnt = sum(len(unit.domains) for unit in saved.run.units[:after])
    row = results["score_matrix"][learnt - 1] if after else results["zero_shot"]
    found = dict(zip(results["domains"], row, strict=False))
    found |= {name: values[after] for name, values in results["general"].items() if after < len(values)}
    return {name: value for name, value in found.items() if value is not None}
