"""Lists of classes: what pictures of a data set may show, and the texts that a dual encoder compares them with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

HOLE = "{}"  # where a prompt has the name of a class


@dataclass(frozen=True)
class ClassList:
    """A list of classes, of which a picture shows one.

    Attributes:
        names: of the classes, as labels and answers have them; unique.
        texts: of each class, in the order of the names: the first is trained with, all of them make an ensemble.
    """

    names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, names: Sequence[str], prompts: Sequence[str]) -> ClassList:
        """Fill every prompt, which has one `{}`, with every name."""
        return cls(tuple(names), tuple(tuple(prompt.replace(HOLE, name) for prompt in prompts) for name in names))

    @classmethod
    def union(cls, lists: Iterable[ClassList]) -> ClassList:
        """Put lists together, in their order; a name that several have keeps all of its texts."""
        texts: dict[str, tuple[str, ...]] = {}
        for name, own in chain.from_iterable(zip(each.names, each.texts, strict=True) for each in lists):
            texts[name] = tuple(dict.fromkeys((*texts.get(name, ()), *own)))
        return cls(tuple(texts), tuple(texts.values()))

    @cached_property
    def places(self) -> dict[str, int]:
        """Name -> place in the list."""
        return {name: place for place, name in enumerate(self.names)}

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of names and texts, in their order."""
        return hashlib.sha256(json.dumps([self.names, self.texts]).encode()).hexdigest()
