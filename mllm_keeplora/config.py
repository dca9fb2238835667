"""The schema of a run: one YAML, dotted overrides; every fault at once, with key, value, what is allowed and origin.

Knows no strategy's own options (those are a pydantic model beside the strategy; `check` puts the two together).
"""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mllm_keeplora.errors import UserError, known, several, shortened, validation_faults
from mllm_keeplora.system import given
from mllm_keeplora.system.plain_yaml import as_yaml as as_yaml
from mllm_keeplora.system.plain_yaml import from_yaml, read_yaml
from mllm_keeplora.system.plugins import load_plugins

SHARED_OPTIONS = {"name", "rank", "alpha"}  # of every strategy: they stay when an override names another one
RUNTIME = {"runtime": True}  # a key that cannot change results: it may differ when a run is continued
LATER = {"later": True}  # a key that older runs did not have
NONFINITE = re.compile(r"stop|rollback|skip\([1-9]\d*\)")
RUN_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
PathText = Annotated[str, AfterValidator(given.as_path)]
ModuleName = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*$")]


def _reaction(value: str) -> str:
    if not NONFINITE.fullmatch(value):
        raise ValueError("must be stop, rollback, or skip(K) with a whole number K of at least 1")
    return value


def runtime(default: Any, **constraints: Any) -> Any:
    """Declare a key that never defines results (device counts, logging); continuing a run may change it."""
    return Field(default, json_schema_extra=RUNTIME, **constraints)


def later(default: Any, **constraints: Any) -> Any:
    """Declare a key that came later: it is told of a run only where it has not its default, as older runs did."""
    return Field(default, json_schema_extra=LATER, **constraints)


def later_defaults(model: BaseModel) -> set[str]:
    """Name the keys of a model that came later and have their default; those of its sections by dotted name."""
    found = set()
    for key, each in type(model).model_fields.items():
        value = getattr(model, key)
        if isinstance(value, Section):
            found |= {f"{key}.{name}" for name in later_defaults(value)}
        elif each.json_schema_extra == LATER and value == each.default:
            found.add(key)
    return found


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    def result_defining(self) -> dict[str, Any]:
        """Flatten the keys that can change results to dotted names, for comparison with a run's own."""
        values = self.model_dump(mode="json", exclude=_runtime_keys(type(self)))
        return {key: value for key, value in flatten(values).items() if key not in later_defaults(self)}


class BaseConfig(Section):
    """The base MLLM: a name in configs/models, a folder, or a hub id."""

    model: PathText  # a name, a folder, or a hub id
    task: Literal["auto", "generate", "classify"] = later(
        "auto", description="what the base does: answer questions, or compare pictures with classes; auto = by its kind"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the frozen weights; auto = bfloat16 on a GPU
    quantization: Literal["nf4", "int8"] | None = None  # of the frozen weights; needs bitsandbytes
    prompt: str = "auto"  # chat_template, or a style; auto = as the base's YAML says
    video: Literal["auto", "frames", "native"] = later(
        "auto",
        description="clips are shown as pictures, or by the base's own input for them; auto = native if it has one",
    )
    attn: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"  # the attention kernel
    trust_remote_code: bool = later(False, description="whether code that comes with the base is run on this machine")
    tower_cache_mb: int | None = runtime(None, ge=0, description="kept tower outputs; null = 512 on a CPU, 0 on a GPU")


class StrategyConfig(BaseModel):
    """Name and preset here; the other keys belong to the strategy's own options and are checked with them."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str
    preset: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class AdaptersConfig(Section):
    target: Literal["language_linears"] | list[str] = Field("language_linears", min_length=1)
    # `keeplora`: its linear layers are target layers like all others, whatever the strategy; `full`: trained as it is.
    projector: Literal["keeplora", "full", "frozen"] = "keeplora"
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of the branches' inputs in a training")
    history: Literal["auto", "merged", "factors"] = "auto"  # how the past is applied; auto merges into float32 weights


class TrainConfig(Section):
    """One domain's training. `batch_size` is global: the number of processes does not change it."""

    lr: float = Field(2e-4, gt=0.0, description="learning rate at its peak")
    lr_projector: float | None = Field(None, gt=0.0, description="only for adapters.projector=full; null = lr")
    epochs: float | None = Field(None, gt=0.0, description="null = as the benchmark publishes it, else 1")
    batch_size: int = Field(64, ge=1, description="records of an optimizer step, over all processes")
    micro_batch_size: int | None = runtime(None, ge=1, description="records per forward; null = all of a process")
    probe_batch_size: int = runtime(8, ge=1, description="records per forward of gradient and feature passes")
    schedule: str = Field(
        "cosine",
        description="of the learning rate: a name in transformers; or `one_cycle`, torch's, which moves beta 1, too",
    )
    warmup_ratio: float = Field(  # from 1 on the Trainer reads a number of steps
        0.03, ge=0.0, lt=1.0, description="of the steps; `one_cycle` has 30 %, or `args.lr_scheduler_kwargs.pct_start`"
    )
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: float = Field(1.0, ge=0.0, description="0 = gradients are not clipped")
    loss_mean: Literal["tokens", "micro_batches"] = later(
        "tokens", description="of a step: over all its answers' tokens, or of the means of its micro-batches"
    )
    on_nonfinite: Annotated[str, AfterValidator(_reaction)] = later(
        "stop", description="at a loss or gradient that is not finite: stop, skip(K) steps of a domain, or rollback"
    )
    max_length: int | None = Field(None, ge=8, description="most tokens of a record; null = no limit")
    gradient_checkpointing: bool = runtime(False)  # less memory, more time
    workers: int | None = runtime(None, ge=0, description="processes that read records; null = 4 beside a GPU, else 0")
    checkpoint_steps: int = runtime(200, ge=1, description="optimizer steps between checkpoints")
    log_steps: int = runtime(10, ge=1, description="optimizer steps between lines of metrics.jsonl")
    args: dict[str, Any] = Field(default_factory=dict)  # further arguments of transformers' Trainer


class DomainOverride(Section):
    train: dict[str, Any] = Field(default_factory=dict)


class EvalConfig(Section):
    """What is asked after every domain, and how."""

    domains: Literal["seen", "all"] = "seen"  # which domains are asked: those learnt so far, or all
    split: Literal["test", "validation"] = "test"  # for choosing settings: the validation questions, and no suite
    batch_size: int = runtime(16, ge=1, description="questions per forward")
    max_new_tokens: int | None = Field(None, ge=1, description="longest answer; null = as the benchmark says")
    limit: int | None = Field(None, ge=1, description="most questions of a domain; null = all")
    suite_limit: int | None = Field(None, ge=1, description="most questions of a suite; null = all")
    weights: Literal["auto", "gathered", "divided"] = runtime("auto")  # under ZeRO-3: whole, or fetched block by block
    collapse_alarm: float | None = runtime(
        50.0, gt=0.0, description="points that a set may fall from one row to the next; null = any number"
    )
    settle_ties: bool = True  # ask again alone where an answer hangs on rounding, so that batches do not tip it
    prompts: Literal["first", "ensemble"] = later(
        "first", description="texts that classes are graded with: the one that is trained with, or the mean of all"
    )
    zero_shot: bool = True  # ask the untouched base, too
    base_answers: PathText | None = runtime(None, description="folder of answers of the untouched base, shared by runs")


class DiagnosticsConfig(Section):
    samples: int = runtime(16, ge=0, description="records of every set that a finished domain is measured on; 0 = none")


class RunConfig(Section):
    """A whole run. Result-defining keys are fixed once a run directory exists; the others may change."""

    name: str = Field(pattern=RUN_NAME)
    base: BaseConfig
    benchmark: str | list[dict[str, Any]] | dict[str, Any]
    data_root: PathText | None = runtime(None, description="folder that the benchmark's files lie in")
    domains: list[str] | str | None = None  # names, the name of one of the benchmark's orders, or its own order
    strategy: StrategyConfig
    adapters: AdaptersConfig = AdaptersConfig()
    train: TrainConfig = TrainConfig()
    per_domain: dict[str, DomainOverride] = Field(default_factory=dict)
    deepspeed: PathText | None = runtime(None, description="zero1, zero2, zero3, zero3_offload, or a JSON file")
    eval: EvalConfig = EvalConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    shots: int | None = later(None, ge=1, description="training records of each class, drawn with the seed; null = all")
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    threads: int | None = runtime(None, ge=1, description="CPU threads of a process; null = as the libraries choose")
    distributed_timeout_s: int = runtime(600, ge=1, description="longest wait for other processes in a training")
    output: PathText | None = runtime(None, description="the run directory; null = runs/NAME")
    plugins: list[ModuleName] = runtime([], description="modules of one's own strategies, scorers, benchmarks, readers")

    @property
    def output_dir(self) -> Path:
        return Path(self.output or f"runs/{self.name}")

    def train_of(self, domain: str) -> TrainConfig:
        """Lay the keys of `per_domain.<domain>.train` over `train`."""
        own = self.per_domain.get(domain)
        return TrainConfig.model_validate({**self.train.model_dump(), **own.train}) if own else self.train

    def resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude=None if self.plugins else {"plugins"})


def load_config(source: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a run's YAML (a path, or a shipped name such as `mini_dcl`) and lay dotted overrides over it.

    `strategy.name=` with another strategy than the file's keeps only the options that every strategy has.

    Raises:
        UserError: file missing, YAML broken, or any key unknown, missing, mistyped or out of range (all at once).
    """
    path = find_config("runs", source)
    values = read_yaml(path)
    for override in sorted(overrides, key=lambda text: not text.startswith("strategy.name=")):
        apply_override(values, override)
    return parse_config(values, origin=str(source))


def parse_config(values: dict[str, Any], origin: str) -> RunConfig:
    """Validate a config given as a dictionary and load its plugins; `origin` is named in every fault."""
    faults = []
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise several(validation_faults(error, origin, RunConfig)) from None
    for domain, own in config.per_domain.items():
        try:
            TrainConfig.model_validate(own.train)
        except ValidationError as error:
            faults += validation_faults(error, origin, TrainConfig, prefix=f"per_domain.{domain}.train.")
    if faults:
        raise several(faults)
    load_plugins(config.plugins, origin)
    return config


def find_config(kind: str, source: str | Path) -> Path:
    """Find a config file by path, or by its name: within configs/<kind>, or of a plugin's benchmark."""
    path = Path(source)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UserError(f"no config file {path}; shipped {kind}: {known(shipped(kind))}")
        return path
    if str(source) not in _named(kind):
        raise UserError(
            f"unknown name {str(source)!r} in configs/{kind}; known: {known(shipped(kind))}, or a .yaml path"
        )
    return Path(_named(kind)[str(source)])


def shipped(kind: str) -> list[str]:
    """Name the configs of a kind: runs, models, benchmarks (those of loaded plugins, too) or sweeps."""
    return sorted(_named(kind))


def benchmarks() -> dict[str, str | Path]:
    """Give the benchmarks by name: YAML files, to which plugins add theirs."""
    return _named("benchmarks")


@cache
def _named(kind: str) -> dict[str, str | Path]:
    folder = resources.files("mllm_keeplora.configs") / kind
    return {entry.name.removesuffix(".yaml"): str(entry) for entry in folder.iterdir() if entry.name.endswith(".yaml")}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted names; an empty dictionary stays a value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key=value in a config's dictionary, in place.

    Raises:
        UserError: not of that form, the value is no YAML, or a key on the way holds a single value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"an override is written key=value, got {override!r}")
    *parents, last = key.split(".")
    for part in parents:
        if not isinstance(values.setdefault(part, {}), dict):
            raise UserError(f"override {override!r}: {part} is a single value and has no keys below it")
        values = values[part]
    try:
        value = from_yaml(text)
    except ValueError as error:
        told = f"{shortened(repr(override))}: the value is not readable YAML: {shortened(error, 500)}"
        raise UserError(f"override {told}") from None
    if key == "strategy.name" and value != values.get("name"):
        for option in values.keys() - SHARED_OPTIONS:
            del values[option]
    values[last] = value


def _runtime_keys(model: type[BaseModel]) -> dict[str, Any]:
    """Runtime keys of a section and of those within it, as pydantic is told to leave them out."""
    found: dict[str, Any] = {}
    for key, field in model.model_fields.items():
        if field.json_schema_extra == RUNTIME:
            found[key] = True
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found[key] = _runtime_keys(field.annotation)
    return found
