"""What a benchmark is: a named, ordered collection of domains with their files, rules of grading and records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mllm_keeplora.config import PathText, later
from mllm_keeplora.data.readers import read_test, read_train
from mllm_keeplora.data.references import with_references
from mllm_keeplora.data.schema import Record
from mllm_keeplora.errors import UserError, known
from mllm_keeplora.metrics import UNGRADED

OTHERS = "*"
# Keys of a domain that say where, not what or how.
PATHS = ("train", "validation", "test", "anchors", "images", "train_images", "references")


class TestSet(BaseModel):
    """Graded questions: files, scorer and how the prompt is put. Paths are relative to the benchmark's root."""

    __test__ = False  # not a test class, whatever pytest thinks of the name
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    test: PathText
    images: PathText | None = Field(
        None, description="folder that image paths are relative to; null = the test file's folder"
    )
    image_mode: Literal["processor", "pad"] = Field(
        "processor", description="pad: to a square in the processor's mean colour, as LLaVA-1.5 does"
    )
    missing_marks: Literal["refuse", "first"] = later(
        "refuse", description="training records with pictures and no <image> mark; first: before the first question"
    )
    scorer: str = "exact"
    prompt_suffix: str | dict[str, str] = Field(
        "",
        description="appended to the question; a mapping gives gold answers (A|B) suffixes of their own, * to others",
    )
    max_new_tokens: int = Field(16, ge=1)
    references: PathText | None = Field(None, description="file with the gold answers, where they are kept apart")

    def suffix_for(self, record: Record) -> str:
        """Choose what is appended to a record's question."""
        if isinstance(self.prompt_suffix, str):
            return self.prompt_suffix
        for golds, suffix in self.prompt_suffix.items():
            if record.answer in golds.split("|"):
                return suffix
        return self.prompt_suffix.get(OTHERS, "")


class Suite(TestSet):
    """A held-out set that is graded after every domain; `anchors` are training records of its kind of ability."""

    anchors: PathText | None = None


class Domain(TestSet):
    """One member of the sequence with its train and test set."""

    train: PathText
    train_images: PathText | None = Field(None, description="as `images`, where training pictures lie elsewhere")
    train_image_mode: Literal["processor", "pad"] | None = later(
        None, description="as `image_mode`, where training pictures are put otherwise"
    )
    validation: PathText | None = None
    epochs: float | None = Field(None, gt=0.0, description="as published; used where the run does not say")

    @property
    def pads_training(self) -> bool:
        return (self.train_image_mode or self.image_mode) == "pad"


class Benchmark(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = "own"
    title: str = ""
    generator: str | None = None
    defaults: dict[str, Any] = Field(default_factory=dict)
    domains: dict[str, Domain]
    orders: dict[str, list[str]] = Field(default_factory=dict, description="official sequences by name")
    suites: dict[str, Suite] = Field(default_factory=dict)
    anchor_suites: dict[str, Suite] = Field(default_factory=dict, exclude=True)  # all suites, whatever is graded
    published: list[dict[str, Any]] = Field(default_factory=list, exclude=True, description="rows for the report")
    root: Path = Path()
    split: Literal["test", "validation"] = "test"

    def has_training(self, domain: str) -> bool:
        """Tell whether a domain's training records are there; an evaluation does without them."""
        return (self.root / self.domains[domain].train).exists()

    def train_records(self, domain: str) -> Sequence[Record]:
        part = self.domains[domain]
        path = self._existing(domain, "training", part.train)
        folder = self.root / part.train_images if part.train_images is not None else self._images(part, path)
        return read_train(path, folder, part.pads_training, part.missing_marks)

    def test_records(self, name: str) -> Sequence[Record]:
        """Read the graded records of a domain or a suite: its test set, or its validation set by `split`."""
        part, role = self.graded(name), self.file_of(name)
        path = self._existing(name, role, getattr(part, role))
        kept_apart = part.references is not None or part.scorer in UNGRADED
        records = read_test(path, self._images(part, path), part.image_mode == "pad", not kept_apart)
        return records if part.references is None else with_references(records, self.root / part.references)

    def anchor_records(self, name: str) -> Sequence[Record]:
        """Read the training records of an anchor set: of a suite that names some, or a file.

        Raises:
            UserError: neither.
        """
        suite = self.anchor_suites.get(name)
        if suite is not None and suite.anchors is not None:
            path = self.root / suite.anchors
            return read_train(path, self._images(suite, path), suite.image_mode == "pad", suite.missing_marks)
        if suite is None and Path(name).is_file():  # a file of the user's: put as the domains' pictures are
            first = next(iter(self.domains.values()))
            return read_train(Path(name), Path(name).parent, first.pads_training, first.missing_marks)
        having = [known_name for known_name, each in self.anchor_suites.items() if each.anchors is not None]
        raise UserError(
            f"strategy.anchors names {name!r}; allowed are files of training records"
            + (f" and the suites {known(having)}" if having else "")
        )

    def graded(self, name: str) -> TestSet:
        """Find the domain or suite of that name: whatever can be asked and graded."""
        return self.domains[name] if name in self.domains else self.suites[name]

    def file_of(self, name: str) -> str:
        """Say which file of a domain or suite is graded: `test` or `validation`."""
        return self.split if name in self.domains else "test"

    def _existing(self, name: str, role: str, file: str) -> Path:
        path = self.root / file
        if not path.exists():
            raise UserError(f"{name}: its {role} file {path} does not exist")
        return path

    def _images(self, part: TestSet, path: Path) -> Path:
        return self.root / part.images if part.images is not None else path.parent
