"""Evaluation of what is not a run: a bare base, a merged checkpoint, or a peft adapter on its base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from mllm_keeplora.config import RunConfig, apply_override, parse_config, read_yaml
from mllm_keeplora.data import load_benchmark
from mllm_keeplora.data.media.images import digests_of
from mllm_keeplora.data.readers import digest
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.grading import errors_of, stored_figures, stored_rows, strict_percent
from mllm_keeplora.eval.harness import forget_journals
from mllm_keeplora.eval.rows import chosen_sets, evaluate_named
from mllm_keeplora.identity import digest_of_lines, environment
from mllm_keeplora.models import Base, load_base
from mllm_keeplora.models.reading import reading
from mllm_keeplora.models.shipped import notes_of
from mllm_keeplora.runs import DomainDir, RunDir
from mllm_keeplora.system import distributed, files

ADAPTER = "adapter_config.json"
ASKED = ("benchmark", "data_root", "domains", "eval", "plugins")  # keys of a run's YAML


class NamesBase(TypedDict, total=False):
    """What is read here of an adapter's settings."""

    base_model_name_or_path: str | None


@dataclass(frozen=True)
class Checkpoint:
    """What is asked: a base by shipped name, folder or hub id, and a peft adapter's folder where there is one."""

    base: str
    adapter: Path | None = None

    @classmethod
    def named(cls, target: str | Path, base: str | None = None) -> Checkpoint:
        """Find the checkpoint behind a name: an adapter's folder needs its base, which it may name itself.

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
        own = files.read_json(folder / ADAPTER, NamesBase).get("base_model_name_or_path")
        if not (base or own):
            raise UserError(f"{folder / ADAPTER} names no base model; say which with --base")
        return cls(base or own, folder)

    def config(self, benchmark: str, output: Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Make a run's config that asks this checkpoint.

        Args:
            benchmark: a name, a benchmark's YAML, or a run's, which also says how it is asked.
            output: folder of the config.
            overrides: dotted keys.
        """
        asked: dict[str, Any] = {"benchmark": benchmark}
        if Path(benchmark).suffix in (".yaml", ".yml") and Path(benchmark).is_file():
            values = read_yaml(Path(benchmark))
            if "strategy" in values:
                asked = {key: values[key] for key in ASKED if key in values}
        base = {"model": self.base}
        if self.adapter is not None and (told := notes_of(self.adapter)):  # of an exported one: how it was prompted
            base["prompt"] = told["prompt"]
        values = {"name": "checkpoint", "base": base, **asked, "strategy": {"name": "finetune"}, "output": str(output)}
        for override in overrides:
            apply_override(values, override)
        return parse_config(values, origin="the command line")

    def load(self, config: RunConfig) -> tuple[Base, Any]:
        """Load the base and the model that answers.

        Raises:
            UserError: the adapter cannot be put on this base.
        """
        base = load_base(config.base, "frozen", ())
        if self.adapter is None:
            return base, base.model
        from peft import PeftModel, get_peft_model_state_dict

        # peft would read a pickle where there is no such file, and only warns where it has other tensors than its
        # branches; an empty branch must not pass.
        tensors = files.read_tensors(self.adapter / "adapter_model.safetensors")
        given = set(tensors)
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(f"adapter {self.adapter}: {broken[0]} holds nan or inf")
        with reading(f"adapter {self.adapter} does not fit {self.base}: it", trusted=False):
            model = PeftModel.from_pretrained(base.model, str(self.adapter))
        wanted = set(get_peft_model_state_dict(model))
        if given != wanted:
            raise UserError(
                f"adapter {self.adapter} does not fit {self.base}: {len(given - wanted)} of its {len(given)} tensors "
                f"have no place there and {len(wanted - given)} places stay empty, e.g. {min(given ^ wanted)}"
            )
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
    names = chosen_sets(loaded, domains, loaded.name)
    folder, path = DomainDir(output), output / "scores.json"
    base, model = checkpoint.load(config)
    adapter = str(checkpoint.adapter) if checkpoint.adapter else None
    adapter_digest = digest(checkpoint.adapter) if checkpoint.adapter else None
    told = {"base": checkpoint.base, "adapter": adapter, "fingerprint": base.fingerprint}
    told |= {"adapter_digest": adapter_digest, "benchmark": loaded.name}
    with RunDir(output).locked():
        # The folder may hold scores of other sets already, of the very same model.
        before = files.read_json(path, files.OBJECT) if path.is_file() else {**told, "sets": {}}
        if any(before.get(key) != value for key, value in told.items()):
            raise UserError(f"{output} holds the answers of another model or benchmark; choose another --output")
        sets = before["sets"]
        for name in names:
            shown = digest_of_lines(digests_of(loaded.test_records(name)))
            asked_of = f"{base.fingerprint} {adapter_digest} {shown}"
            facts = evaluate_named(base, model, loaded, name, config, folder, asked_of=asked_of, keep_journal=True)
            rows = stored_rows(folder.predictions(name))
            opinions = {"strict": strict_percent(rows), "errors": errors_of(rows, loaded.graded(name))}
            sets[name] = {**stored_figures(folder.predictions(name)), **facts, **opinions}
        if distributed.is_main():
            files.write_json(path, {**told, "environment": environment(), "sets": sets})
        forget_journals(folder, names)
    return {name: sets[name]["score"] for name in names}
