"""What a benchmark is: a named, ordered collection of domains with their files, rules of grading and records."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from mllm_keeplora.config import PathText, later
from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.layouts import published, published_digest
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.data.naming import Naming, few_of_each, make_naming, read_class_file
from mllm_keeplora.data.readers import digest, read_published, read_test, read_train
from mllm_keeplora.data.references import with_references
from mllm_keeplora.data.schema import Record
from mllm_keeplora.errors import UserError, known
from mllm_keeplora.metrics import UNGRADED

OTHERS = "*"
# Keys of a domain that say where, not what or how.
PATHS = ("train", "validation", "test", "anchors", "images", "train_images", "references", "classes")


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
    video: VideoOptions = later(VideoOptions(), description="how frames of clips are chosen, trained on and asked")
    scorer: str = "exact"
    prompt_suffix: str | dict[str, str] = Field(
        "",
        description="appended to the question; a mapping gives gold answers (A|B) suffixes of their own, * to others",
    )
    max_new_tokens: int = Field(16, ge=1)
    references: PathText | None = Field(None, description="file with the gold answers, where they are kept apart")
    classes: PathText | None = later(
        None, description="list of class names, below the data root or beside the benchmark's YAML; rows have a label"
    )
    prompts: list[str] | None = later(
        None, description="texts of a class, {} its name; the first is trained with; null = as the file of classes says"
    )
    question: str = later("Which class is shown?", description="that a base which writes is asked of a class record")
    layout: str | None = later(None, description="reader of a published folder; `train` and `test` name the folder")
    counts: dict[Literal["classes", "train", "validation", "test"], int] | None = later(
        None, description="what the published set has; a check holds what it finds to it"
    )

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
    candidates: Literal["own", "seen", "all"] = later(
        "own", description="classes that compete: the domain's, those of the domains learnt so far too, or of all"
    )

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
    home: Path = Field(Path(), exclude=True, description="folder of the benchmark's YAML")
    _drawn: tuple[int, int] | None = PrivateAttr(None)  # training records of each class, and the seed they come by
    _seen: frozenset[str] = PrivateAttr(frozenset())  # domains that are learnt, whose classes may compete
    _namings: dict[str, Naming] = PrivateAttr(default_factory=dict)

    def has_training(self, domain: str) -> bool:
        """Tell whether a domain's training records are there; an evaluation does without them."""
        return (self.root / self.domains[domain].train).exists()

    def draw(self, shots: int | None, seed: int) -> None:
        """Take so many training records of each class from now on, drawn with a seed; None for all of them."""
        self._drawn = None if shots is None else (shots, seed)

    def after(self, seen: Collection[str]) -> Benchmark:
        """Give the benchmark as it is graded once some domains are learnt: their classes may compete."""
        graded = self.model_copy()
        graded._seen = frozenset(seen)
        return graded

    def train_records(self, domain: str, whole: bool = False) -> Sequence[Record]:
        """Read the training records of a domain: those that are drawn, or the whole set."""
        part, naming = self.domains[domain], self.naming(domain)
        path = self._existing(domain, "training", part.train)
        folder = self.root / part.train_images if part.train_images is not None else self._images(part, path)
        if part.layout is not None:
            records = read_published(part.layout, path, folder, "train", naming, part.pads_training)
        else:
            records = read_train(path, folder, part.pads_training, part.missing_marks, naming, part.video)
        if self._drawn is None or whole:
            return records
        shots, seed = self._drawn
        return few_of_each(records, shots, f"{seed}/{domain}")

    def test_records(self, name: str) -> Sequence[Record]:
        """Read the graded records of a domain or a suite: its test set, or its validation set by `split`."""
        records, candidates = self._graded_records(name), self.candidates_of(name, self._seen)
        if candidates is None or candidates == self.naming(name).classes:
            return records
        return [replace(record, classes=candidates) for record in records]

    def anchor_records(self, name: str) -> Sequence[Record]:
        """Read the training records of an anchor set: of a suite that names some, or a file.

        Raises:
            UserError: neither.
        """
        suite = self.anchor_suites.get(name)
        if suite is not None and suite.anchors is not None:
            path, pads, naming = self.root / suite.anchors, suite.image_mode == "pad", self.naming(name)
            return read_train(path, self._images(suite, path), pads, suite.missing_marks, naming, suite.video)
        if suite is None and Path(name).is_file():  # a file of the user's: put as the domains' pictures are
            domain, first = next(iter(self.domains.items()))
            naming = self.naming(domain)
            how = (first.pads_training, first.missing_marks, naming, first.video)
            return read_train(Path(name), Path(name).parent, *how)
        having = [known_name for known_name, each in self.anchor_suites.items() if each.anchors is not None]
        raise UserError(
            f"strategy.anchors names {name!r}; allowed are files of training records"
            + (f" and the suites {known(having)}" if having else "")
        )

    def naming(self, name: str) -> Naming | None:
        """Say how the class records of a domain or suite are read; None where its records are none.

        Raises:
            UserError: the file of classes, or the published files that name them, cannot be read.
        """
        part = self.graded(name)
        if part.classes is None and part.layout is None:
            return None
        if name not in self._namings:
            listed = self.file(name, "classes")
            labels = None
            if part.layout is not None:
                labels = published(part.layout, self._existing(name, "test", part.test), "test").labels
            origin = f"{name}, classes of {listed or self.root / part.test}"
            classes = read_class_file(listed) if listed is not None else None
            self._namings[name] = make_naming(classes, labels, part.prompts, part.question, origin)
        return self._namings[name]

    def candidates_of(self, name: str, seen: Collection[str]) -> ClassList | None:
        """List the classes that compete when a domain or suite is graded; None where its records have none.

        Args:
            name: of the domain or suite; its own classes always compete.
            seen: names of the domains that are learnt.
        """
        if (own := self.naming(name)) is None:
            return None
        rule = getattr(self.graded(name), "candidates", "own")
        others = {"own": (), "seen": seen, "all": self.domains}[rule]
        found = [self.naming(each) for each in self.domains if each in others or each == name] or [own]
        return ClassList.union([each.classes for each in found if each is not None])

    @property
    def video(self) -> VideoOptions:
        """Say how clips are shown where no domain is told: as the first domain's are."""
        return next(iter(self.domains.values())).video

    def graded(self, name: str) -> TestSet:
        """Find the domain or suite of that name: whatever can be asked and graded."""
        if name in self.domains:
            return self.domains[name]
        return self.suites[name] if name in self.suites else self.anchor_suites[name]

    def file(self, name: str, key: str) -> Path | None:
        """Give the path of a file that a domain or suite names; None where it names none."""
        named = getattr(self.graded(name), key, None)
        if named is None:
            return None
        path = self.root / named
        return self.home / named if key == "classes" and not path.exists() else path

    def digest_of(self, name: str, key: str) -> str:
        """Digest what a file of a domain or suite says: its bytes, or of a published folder its rows."""
        layout = self.graded(name).layout
        path = self.file(name, key)
        if key == "classes":
            return self.naming(name).digest
        if layout is not None and key in ("train", "validation", "test"):
            return published_digest(layout, path, key)
        return digest(path)

    def file_of(self, name: str) -> str:
        """Say which file of a domain or suite is graded: `test` or `validation`."""
        return self.split if name in self.domains else "test"

    def _graded_records(self, name: str) -> Sequence[Record]:
        part, role, naming = self.graded(name), self.file_of(name), self.naming(name)
        path = self._existing(name, role, getattr(part, role))
        images, pads = self._images(part, path), part.image_mode == "pad"
        if part.layout is not None:
            return read_published(part.layout, path, images, role, naming, pads, graded=True)
        kept_apart = part.references is not None or part.scorer in UNGRADED
        records = read_test(path, images, pads, not kept_apart, naming, part.video)
        return records if part.references is None else with_references(records, self.root / part.references)

    def _existing(self, name: str, role: str, file: str) -> Path:
        path = self.root / file
        if not path.exists():
            raise UserError(f"{name}: its {role} file {path} does not exist")
        return path

    def _images(self, part: TestSet, path: Path) -> Path:
        if part.images is not None:
            return self.root / part.images
        return path if part.layout is not None and path.is_dir() else path.parent
