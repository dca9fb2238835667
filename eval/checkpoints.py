"""Evaluation of what is not a run: a bare base, a merged checkpoint, or a peft adapter on its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_keeplora.config import RunConfig, apply_override, parse_config, read_yaml
from mllm_keeplora.data import Benchmark, load_benchmark
from mllm_keeplora.data.readers import digest
from mllm_keeplora.errors import UserError, first_line, known
from mllm_keeplora.eval.grading import errors_of, stored_figures, strict_percent
from mllm_keeplora.eval.harness import forget_journals
from mllm_keeplora.eval.rows import evaluate_named, stored_rows
from mllm_keeplora.identity import environment
from mllm_keeplora.models import Base, load_base
from mllm_keeplora.models.shipped import NOTES
from mllm_keeplora.runs import DomainDir, RunDir
from mllm_keeplora.system import distributed, files

ADAPTER = "adapter_config.json"
ASKED = ("benchmark", "data_root", "domains", "eval", "plugins")  # keys of a run's YAML


@dataclass(frozen=True)
class Checkpoint:
    """What is asked: a base by shipped name, folder or hub id, and a peft adapter's folder where there is one."""

    base: str
    adapter: Path | None = None

    @property
    def base_settings(self) -> dict[str, Any]:
        """The `base` section of a config; an exported adapter says how its model was prompted."""
        told = self.adapter / NOTES if self.adapter is not None else None
        prompt = files.read_json(told)["prompt"] if told is not None and told.is_file() else "auto"
        return {"model": self.base, "prompt": prompt}

    @classmethod
    def named(cls, target: str | Path, base: str | None = None) -> Checkpoint:
        """The checkpoint behind a name: an adapter's folder needs its base, which it may name itself.

        Raises:
            UserError: the adapter does not say what it was made for, and neither does `base`.
        """
        folder = Path(target)
        if not (folder / ADAPTER).is_file():
            if base is not None:
                raise UserError(f"--base is for adapters; {target} has no {ADAPTER}")
            return cls(str(target))
        if (folder.parent / "manifest.json").is_file():
            raise UserError(
                f"{folder} is one domain's part of a run, without the domains before it; "
                f"use: mllm-keeplora eval {folder.parent.parent.parent} --after N"
            )
        own = files.read_json(folder / ADAPTER).get("base_model_name_or_path")
        if not (base or own):
            raise UserError(f"{folder / ADAPTER} names no base model; say which with --base")
        return cls(base or own, folder)

    def config(self, benchmark: str, output: Path, overrides: Sequence[str] = ()) -> RunConfig:
        """A run's config that asks this checkpoint; overrides are dotted keys."""
        values: dict[str, Any] = {
            "name": "checkpoint",
            "base": self.base_settings,
            **_asked(benchmark),
            "strategy": {"name": "finetune"},
            "output": str(output),
        }
        for override in overrides:
            apply_override(values, override)
        return parse_config(values, origin="the command line")

    def load(self, config: RunConfig) -> tuple[Base, Any]:
        """The base and the model that answers.

        Raises:
            UserError: the adapter cannot be put on this base.
        """
        base = load_base(config.base, "frozen", ())
        if self.adapter is None:
            return base, base.model
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(base.model, str(self.adapter))
        except (ValueError, RuntimeError, KeyError) as error:
            reason = first_line(error)
            raise UserError(f"adapter {self.adapter} does not fit {self.base}: {reason}") from None
        _refuse_unfilled(model, self.adapter, self.base)
        return base, model.eval()


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    benchmark: str,
    output: Path,
    domains: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, float | None]:
    """Ask a checkpoint the test questions of a benchmark; predictions and scores are written to a folder.

    Args:
        checkpoint: what answers.
        benchmark: a shipped name, a benchmark's YAML, or a run's, whose questions and settings of `eval` are used.
        output: gets `predictions/<set>.jsonl` and `scores.json`; an interrupted evaluation goes on where it was.
        domains: names of domains and suites; None for all.
        overrides: dotted keys of a run's config (`eval.batch_size=1`, `data_root=...`).

    Returns:
        Set name -> score in percent; None where a set cannot be graded here.

    Raises:
        UserError: unknown benchmark or set, unreadable data, a checkpoint that cannot be loaded.
    """
    config = checkpoint.config(benchmark, output, overrides)
    loaded = load_benchmark(config)
    names = _chosen(loaded, domains)
    folder, scores = DomainDir(output), {}
    base, model = checkpoint.load(config)
    adapter_digest = digest(checkpoint.adapter) if checkpoint.adapter else None
    told: dict[str, Any] = {
        "base": checkpoint.base,
        "adapter": str(checkpoint.adapter) if checkpoint.adapter else None,
        "fingerprint": base.fingerprint,
        "adapter_digest": adapter_digest,
        "benchmark": loaded.name,
        "environment": environment(),
    }
    with RunDir(output).locked():
        told["sets"] = _same_model(output, told)
        for name in names:
            asked_of = f"{base.fingerprint} {adapter_digest}"
            facts = evaluate_named(base, model, loaded, name, config, folder, asked_of=asked_of, keep_journal=True)
            scores[name] = facts["score"]
            rows = stored_rows(folder, name) or []
            opinions = {"strict": strict_percent(rows), "errors": errors_of(rows, loaded.graded(name))}
            told["sets"][name] = {**stored_figures(folder.predictions(name)), **facts, **opinions}
        if distributed.is_main():
            files.write_json(output / "scores.json", told)
        forget_journals(folder, names)
    return scores


def _asked(benchmark: str) -> dict[str, Any]:
    """Sections of a config that say what is asked and how: of a benchmark by its name or YAML, or of a run's YAML."""
    if Path(benchmark).suffix in (".yaml", ".yml") and Path(benchmark).is_file():
        values = read_yaml(Path(benchmark))
        if "strategy" in values:
            return {key: values[key] for key in ASKED if key in values}
    return {"benchmark": benchmark}


def _refuse_unfilled(model: Any, adapter: Path, base: str) -> None:
    """peft only warns where an adapter's file has other tensors than its branches; an empty branch must not pass."""
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as stored:
        given = set(stored.keys())
    wanted = set(get_peft_model_state_dict(model))
    if given != wanted:
        odd = sorted(given ^ wanted)[0]
        raise UserError(
            f"adapter {adapter} does not fit {base}: {len(given - wanted)} of its {len(given)} tensors have no place "
            f"there and {len(wanted - given)} places stay empty, e.g. {odd}"
        )


def _same_model(output: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Scores of other sets that the folder holds already, of the very same model.

    Raises:
        UserError: they are another model's.
    """
    path = output / "scores.json"
    if not path.is_file():
        return {}
    before = files.read_json(path)
    keys = ("base", "adapter", "fingerprint", "adapter_digest", "benchmark")
    if any(before.get(key) != told[key] for key in keys):
        raise UserError(f"{output} holds the answers of another model or benchmark; choose another --output")
    return before["sets"]


def _chosen(benchmark: Benchmark, domains: Sequence[str] | None) -> list[str]:
    allowed = [*benchmark.domains, *benchmark.suites]
    names = list(domains) if domains is not None else allowed
    unknown = [name for name in names if name not in allowed]
    if unknown:
        raise UserError(f"{benchmark.name} has no domain or suite {unknown[0]!r}; known: {known(allowed)}")
    return names
