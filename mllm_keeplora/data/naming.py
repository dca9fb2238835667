"""How the rows of a domain name the classes that its pictures show: its list, what is asked, the names rows use."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from mllm_keeplora.data.classes import HOLE, ClassList
from mllm_keeplora.data.schema import Record
from mllm_keeplora.data.store import Selection
from mllm_keeplora.errors import UserError, several, shortened, validation_faults
from mllm_keeplora.system import given

PROMPTS = ("a photo of a {}.",)  # where neither the domain nor its file of classes says


@dataclass(frozen=True)
class Naming:
    """What is needed to read class records.

    Attributes:
        classes: the list; answers are its names.
        question: what a base that writes is asked.
        labels: what rows call a class -> its name; empty where rows say the name.
        faults: a sentence for each thing that is wrong with the list; records are read nevertheless.
    """

    classes: ClassList
    question: str
    labels: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """A SHA-256 of everything here that a record depends on."""
        told = [self.classes.digest, self.question, sorted(self.labels.items())]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


class ClassFile(BaseModel):
    """Hold what a file of classes says; a plain list is its names."""

    model_config = ConfigDict(extra="forbid")
    names: list[str] = Field(min_length=1)
    prompts: list[str] = []
    labels: list[str] | None = None  # what published files call each class, in the order of the names
    source: str = ""


def read_class_file(path: Path) -> ClassFile:
    """Read a list of names, or an object with `names`, `prompts` and `labels`.

    Raises:
        UserError: missing, no JSON, or of another shape.
    """
    try:
        values = given.from_json(given.read_bytes(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"file of classes {path} is not readable JSON: {given.why(error)}") from None
    try:
        return TypeAdapter(ClassFile).validate_python({"names": values} if isinstance(values, list) else values)
    except ValidationError as error:
        raise several(validation_faults(error, str(path), ClassFile)) from None


def make_naming(
    listed: ClassFile | None,
    published: Sequence[str] | None,
    prompts: Sequence[str] | None,
    question: str,
    origin: str,
) -> Naming:
    """Put together what a domain's own settings, its file of classes and its published files say.

    Args:
        listed: the file of classes, if the domain names one.
        published: what published files call the classes, in their order; None without a `layout`.
        prompts: of the domain itself; they go before those of the file.
        question: of the domain.
        origin: for the faults: the domain, and where its list comes from.
    """
    faults: list[str] = []
    if listed is None:
        names = [label.replace("_", " ") for label in published or ()]
        labels = dict(zip(published or (), names, strict=True))
    else:
        names, calls = listed.names, listed.labels
        if calls is not None and len(calls) != len(names):
            faults.append(f"{origin}: {len(names)} names, but {len(calls)} labels; each name needs one")
        labels = dict(zip(calls or (), names, strict=False))
        if published is not None:
            faults += _unlike(published, calls or names, origin)
    chosen = tuple(prompts if prompts is not None else (listed.prompts if listed else ()) or PROMPTS)
    faults += list_faults(names, chosen, origin)
    return Naming(ClassList.of(names, chosen), question, labels, tuple(faults))


def list_faults(names: Sequence[str], prompts: Sequence[str], origin: str) -> Iterator[str]:
    """Yield a sentence for each name that nobody could answer rightly, and each prompt without one place for a name."""
    if any(not name.strip(" _") for name in names):
        yield f"{origin}: the name of a class is empty"
    alike = defaultdict(list)
    for name in names:
        alike[name.replace("_", " ").strip().casefold()].append(name)  # as an answer is compared
    for same in alike.values():
        if len(same) > 1:
            quoted = " and ".join(shortened(repr(each)) for each in same[:5])
            told = quoted if len(set(same)) > 1 else f"{shortened(repr(same[0]))} twice"
            yield f"{origin}: class names must differ, also with spaces for _ and in lower case; there is {told}"
    if not prompts:
        yield f"{origin}: prompts is empty; at least one is needed"
    for prompt in prompts:
        if prompt.count(HOLE) != 1:
            yield f"{origin}: a prompt holds one {HOLE}, the place of the class name; got {shortened(repr(prompt))}"


def untrained_classes(naming: Naming, records: Sequence[Record]) -> list[str]:
    """Name the classes of the list that no training record shows."""
    shown = {record.turns[-1].text for record in records}
    return [name for name in naming.classes.names if name not in shown]


def few_of_each(records: Sequence[Record], shots: int, seed: str) -> Selection:
    """Draw so many training records of each class, in the order of the set; all of a class that has fewer."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(records):
        places[record.turns[-1].text].append(place)
    generator = random.Random(seed)
    drawn = [own if len(own) <= shots else generator.sample(own, shots) for own in places.values()]
    return Selection(records, sorted(place for own in drawn for place in own))


def _unlike(published: Sequence[str], listed: Sequence[str], origin: str) -> Iterator[str]:
    """Say which classes stand in the published files alone, which in the list alone, and which twice in it."""
    missing = [name for name in listed if name not in set(published)]
    extra = [name for name in published if name not in set(listed)]
    if missing:
        yield f"{origin}: the published files lack class {_few(missing)}"
    if extra:
        yield f"{origin}: the list lacks class {_few(extra)} of the published files"
    twice = [label for label, count in Counter(listed).items() if count > 1]
    if twice:
        yield f"{origin}: {_few(twice)} is listed twice as what published files call a class"


def _few(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(shortened(repr(name)) for name in names[:most])}{more}"
