"""What the diagnostics of a run say, as numbers for tables and pictures: capacity, gradient split, leak, interference.

Reads what each unit wrote (`gradient.json`, `diagnostics.json`); opens no run and no model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

PROJECTOR = "projector"


class UnitFacts(NamedTuple):
    """One unit of a run: its name, the content of its gradient.json and of its diagnostics.json (empty if absent)."""

    name: str
    gradient: Mapping[str, Any]
    diagnostics: Mapping[str, Any]


@dataclass(frozen=True)
class CapacityRow:
    """Room in the layers of one kind (q_proj, ..., projector).

    Attributes:
        d_in: input size, or the range of sizes.
        shares: median share of directions kept, before the first unit and after each.
        free: fewest free directions of a layer now.
        units_left: units until the fullest layer has no direction left, at the mean growth so far; None if none grows.
    """

    kind: str
    d_in: str
    shares: tuple[float, ...]
    free: int
    units_left: float | None


@dataclass(frozen=True)
class Matrix:
    """Rows and columns by name; None where not measured."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


def kind_of(layer: str) -> str:
    """The layers that are told apart: by the name within a block; all of the projector together."""
    return PROJECTOR if ".layers." not in layer else layer.rsplit(".", 1)[-1]


def depth_of(layer: str) -> int | None:
    """Index of the block; None for the projector."""
    head, found, rest = layer.rpartition(".layers.")
    return int(rest.split(".")[0]) if found and head else None


def capacity_rows(units: Sequence[UnitFacts]) -> list[CapacityRow]:
    """A row per kind of layer, from the last unit that was diagnosed; empty if nothing is kept."""
    capacity = _last(units).get("capacity", {})
    rows = []
    for kind in dict.fromkeys(map(kind_of, capacity)):
        layers = [facts for layer, facts in capacity.items() if kind_of(layer) == kind]
        sizes = sorted({facts["d_in"] for facts in layers})
        steps = range(len(layers[0]["parts"]))
        shares = tuple(
            statistics.median(sum(facts["parts"][: step + 1]) / facts["d_in"] for facts in layers) for step in steps
        )
        rows.append(
            CapacityRow(
                kind,
                str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]}-{sizes[-1]}",
                shares,
                min(facts["free"] for facts in layers),
                _units_left(layers),
            )
        )
    return rows


def gradient_split(units: Sequence[UnitFacts]) -> dict[str, dict[str, float]]:
    """Unit -> mean over layers of the shares of gradient energy: protected, captured, discarded."""
    split = {}
    for unit in units:
        layers = [facts for facts in unit.gradient.get("gradient", {}).values() if "protected" in facts]
        if layers:
            keys = ("protected", "captured", "discarded", "captured_of_residual")
            split[unit.name] = {key: statistics.fmean(facts[key] for facts in layers) for key in keys}
    return split


def changes(units: Sequence[UnitFacts]) -> dict[str, dict[str, float]]:
    """Unit -> median update size and, where something is kept, the largest leak of a layer in each form."""
    found = {}
    for unit in units:
        layers = list(unit.diagnostics.get("changes", {}).values())
        if layers:
            found[unit.name] = {"update": statistics.median(facts["update"] for facts in layers)}
            for key in ("leak", "leak_evaluated", "leak_bfloat16"):
                values = [facts[key] for facts in layers if key in facts]
                if values:
                    found[unit.name][key] = max(values)
    return found


def update_by_depth(units: Sequence[UnitFacts]) -> dict[str, dict[int, float]]:
    """Unit -> block -> mean over its layers of ||dW|| / ||W||."""
    found: dict[str, dict[int, float]] = {}
    for unit in units:
        by_depth: dict[int, list[float]] = {}
        for layer, facts in unit.diagnostics.get("changes", {}).items():
            depth = depth_of(layer)
            if depth is not None:
                by_depth.setdefault(depth, []).append(facts["update"])
        if by_depth:
            found[unit.name] = {depth: statistics.fmean(values) for depth, values in sorted(by_depth.items())}
    return found


def interference(units: Sequence[UnitFacts]) -> Matrix:
    """How strongly the update of a unit (row) answers to inputs of a set (column), in percent of the layer's output."""
    units = [unit for unit in units if unit.diagnostics.get("inputs")]
    columns = tuple(dict.fromkeys(name for unit in units for name in unit.diagnostics["inputs"]))
    values = tuple(
        tuple(
            _mean(unit.diagnostics["inputs"].get(name), lambda facts: 100 * facts["interference"]) for name in columns
        )
        for unit in units
    )
    return Matrix(tuple(unit.name for unit in units), columns, values)


def overlap(units: Sequence[UnitFacts]) -> Matrix:
    """Share of a set's input energy (row) inside what was kept by whom (column), in percent, at the last unit."""
    inputs = _last(units).get("inputs", {})
    parts = max((len(facts["covered"]) for layers in inputs.values() for facts in layers.values()), default=0)
    columns = ("start", *(unit.name for unit in units))[:parts]
    values = tuple(
        tuple(_mean(layers, lambda facts, part=part: 100 * facts["covered"][part]) for part in range(parts))
        for layers in inputs.values()
    )
    return Matrix(tuple(inputs), columns, values)


def _last(units: Sequence[UnitFacts]) -> Mapping[str, Any]:
    return next((unit.diagnostics for unit in reversed(units) if unit.diagnostics), {})


def _mean(layers: Mapping[str, Any] | None, value: Callable[[Mapping[str, Any]], float]) -> float | None:
    return statistics.fmean(value(facts) for facts in layers.values()) if layers else None


def _units_left(layers: Sequence[Mapping[str, Any]]) -> float | None:
    growth = [(facts["free"], statistics.fmean(facts["parts"][1:])) for facts in layers if len(facts["parts"]) > 1]
    left = [free / mean for free, mean in growth if mean > 0]
    return min(left, default=None)
