"""YAML as JSON has it: texts, plain finite numbers, yes and no, lists and mappings. What people misread is refused.

Anchors are counted as often as they stand for something, so that a small file cannot stand for an endless one.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from mllm_keeplora.errors import UserError, shortened
from mllm_keeplora.system import given

MOST_VALUES = 50_000  # keys and values of a file
TAG = "tag:yaml.org,2002:"
PLAIN = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+)$")
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, whose first value YAML's readers drop without a word.

    And reads `1e-4` as a number, as people mean it; to YAML 1.1 it is a string. A date is a text. `010` and `1:30`,
    which YAML 1.1 takes for 8 and 90, are refused, as are numbers that are not finite, and tags of other types.
    """

    def __init__(self, stream: Any):
        super().__init__(stream)
        self.num_values, self.depth = 0, 0
        self.sizes: dict[int, int] = {}  # of every node that was read to its end, by its identity

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event, before = self.peek_event(), self.num_values
        self.num_values, self.depth = self.num_values + 1, self.depth + 1
        if self.depth > given.DEEPEST:
            raise _fault(given.TOO_DEEP, event)
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self.sizes:
                raise _fault(f"{event.anchor} stands for itself,", event)
            self.num_values += self.sizes[id(node)]
        else:
            self.sizes[id(node)] = self.num_values - before
        if self.num_values > MOST_VALUES:
            raise _fault(
                f"it holds more than {MOST_VALUES:,} keys and values, anchors counted where they are used,", event
            )
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _fault("a list or a mapping cannot be a key,", key)
            if key.value in seen:
                raise _fault(f"{shortened(key.value)} stands there twice,", seen[key.value])
            seen[key.value] = key
        return node

    def construct_scalar(self, node: yaml.Node) -> str:
        text = super().construct_scalar(node)
        if "\0" in text or any("\ud800" <= each <= "\udfff" for each in text):
            raise _fault(f"{shortened(ascii(text))} is no text that can be written,", node)
        return text

    def whole(self, node: yaml.Node) -> int:
        text = self.construct_scalar(node)
        value = int(text.replace("_", ""), 0) if PLAIN.match(text) and len(text) < 80 else None
        if value is None or abs(value) >= 1 << 63:
            raise _fault(f"{shortened(text)} is no plain number of at most 63 bits; quote it if it is a text,", node)
        return value

    def number(self, node: yaml.Node) -> float:
        text = self.construct_scalar(node)
        try:
            value = float(text.replace("_", ""))
        except ValueError:  # .inf, .nan, 1:30.5
            value = math.inf
        if not math.isfinite(value):
            raise _fault(f"{shortened(text)} is no plain finite number; quote it if it is a text,", node)
        return value


class StrictDumper(yaml.SafeDumper):
    """Quotes what `StrictLoader` would read as something else, or refuse."""


def _fault(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


StrictLoader.yaml_constructors = {
    **{
        f"{TAG}{kind}": yaml.SafeLoader.yaml_constructors[f"{TAG}{kind}"]
        for kind in ("null", "bool", "str", "seq", "map")
    },
    f"{TAG}int": StrictLoader.whole,
    f"{TAG}float": StrictLoader.number,
    None: yaml.SafeLoader.yaml_constructors[None],
}
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in each if tag != f"{TAG}timestamp"]
    for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _each in (StrictLoader, StrictDumper):
    _each.add_implicit_resolver(f"{TAG}float", EXPONENT, list("-+.0123456789"))


def as_yaml(values: Any) -> str:
    """Write YAML that `read_yaml` reads as the same."""
    return yaml.dump(values, Dumper=StrictDumper, sort_keys=False, allow_unicode=True)


def from_yaml(text: str | bytes) -> Any:
    """Parse YAML.

    Raises:
        ValueError: it is not readable, or more than is allowed.
    """
    text = given.as_text(text) if isinstance(text, bytes) else text
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except KeyError as error:  # of the tag !!bool
        raise ValueError(f"{error} is neither yes nor no") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a file of keys and values.

    Raises:
        UserError: it is missing, too large, not readable, or holds something else.
    """
    data = given.read_bytes(path, given.MOST_YAML)
    try:
        values = from_yaml(data)
    except ValueError as error:
        raise UserError(f"{path} is not readable YAML: {shortened(error, 500)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values
