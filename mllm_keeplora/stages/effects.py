"""What a unit did to the model, measured right after it: room left, leak, interference, overlap. Changes nothing.

Written to the unit's `diagnostics.json`; `report` turns it into tables and pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters import Factors
from mllm_keeplora.data import Benchmark, Record
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.data.schema import Turn
from mllm_keeplora.probes.features import measure_inputs
from mllm_keeplora.runs import Unit
from mllm_keeplora.strategies.passes import own_batches
from mllm_keeplora.system import dealing

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mllm_keeplora.linalg import Basis
    from mllm_keeplora.models import Base


def capacity_of(parts: dict[str, list[int]], kept: dict[str, Basis]) -> dict[str, dict[str, Any]]:
    """Per layer: `d_in`, columns kept before the first unit and added by each (`parts`), and `free` directions."""
    return {
        layer: {"d_in": basis.d_in, "parts": parts[layer], "free": basis.d_in - basis.rank}
        for layer, basis in kept.items()
    }


def changes_of(
    factors: Factors, before: list[Factors], pristine: Callable[[str], Tensor], kept: dict[str, Basis], dtype
) -> dict[str, dict[str, float]]:
    """Per layer: size of the update relative to the weight, and how much of it lies in what was to be protected.

    Args:
        factors: of the unit.
        before: of the earlier units.
        pristine: gives a layer's untouched weight (d_out, d_in).
        kept: bases before the unit; empty if the strategy keeps nothing.
        dtype: what weights are evaluated in, where the past is merged; None where it runs as factors.

    Returns:
        `update`, ||dW|| / ||W||; with bases also `leak` of the factors' own dW (||dW Q|| / ||dW||), `leak_evaluated` of
        the weights that really run, and `leak_bfloat16`, what a merge cast to bfloat16 would have.
    """
    import torch

    from mllm_keeplora.linalg import leak

    def look(layer: str, weight: Tensor) -> dict[str, float]:
        weight = weight.detach().float()
        delta = factors.delta(layer).to(weight)
        found = {"update": float(delta.norm() / weight.norm())}
        if layer not in kept:
            return found
        past = weight + sum((each.delta(layer).to(weight) for each in before if layer in each.A), torch.zeros(()))
        found["leak"] = leak(delta, kept[layer])
        for name, kind in (("leak_evaluated", dtype), ("leak_bfloat16", torch.bfloat16)):
            if kind is None:
                found[name] = found["leak"]
            else:
                found[name] = leak((past + delta).to(kind).float() - past.to(kind).float(), kept[layer])
        return found

    costs = {layer: float(kept[layer].rank if layer in kept else 1) * A.shape[1] for layer, A in factors.A.items()}
    return dealing.divided(costs, pristine, look)


def inputs_of(
    model: Any, base: Base, records: Sequence[Record], factors: Factors, slices: dict[str, list[Tensor]], size: int
) -> dict[str, dict[str, Any]]:
    """Per layer, over the inputs that some records cause: how strongly the unit's update answers to them.

    Args:
        model: what runs now.
        base: names layers and prompts.
        records: training records.
        factors: of the unit.
        slices: per layer the kept columns (d_in, k), one tensor for each part of `capacity_of`.
        size: records per forward.

    Returns:
        `interference`, the mean of ||x dW^T|| / ||layer(x)||, and `covered`, the share of the inputs' energy inside
        each slice of the kept basis. Layers without inputs, as a projector's without pictures, are left out.
    """
    import torch

    def measure(layer: str) -> Callable[[Tensor, Tensor], Tensor]:
        A, B = (factors.A.get(layer), factors.B.get(layer)) if layer in factors.A else (None, None)

        def sums(inputs: Tensor, outputs: Tensor) -> Tensor:
            rows, answers = inputs.float(), outputs.float().norm(dim=-1).clamp(min=1e-12)
            ratio = rows.new_zeros(())
            if A is not None:
                change = (rows @ A.to(rows).mT) @ B.to(rows).mT * factors.scaling(layer)
                ratio = (change.norm(dim=-1) / answers).sum()
            inside = [(rows @ columns.to(rows)).square().sum() for columns in slices.get(layer, [])]
            return torch.stack([rows.new_tensor(rows.shape[0]), ratio, rows.square().sum(), *inside]).double()

        return sums

    layers = {layer: base.model.get_submodule(layer) for layer in base.parts.target_layers}
    inputs = own_batches(base.model, base.family.training_batch, records, size)
    lengths = {layer: 3 + len(slices.get(layer, [])) for layer in layers}
    sums = measure_inputs(base.family, model, layers, inputs, measure, lengths)
    return {
        layer: {"interference": float(values[1] / values[0]), "covered": (values[3:] / values[2]).tolist()}
        for layer, values in sums.items()
        if values[0] > 0
    }


def sets_to_look_at(benchmark: Benchmark, units: list[Unit], unit: Unit, everything: bool, samples: int):
    """Name -> training records: of the domains learnt so far, or of all (`everything`), and of the suites."""
    names = [name for each in units if everything or each.index <= unit.index for name in each.domains]
    for name in names:
        yield name, evenly_spaced(benchmark.train_records(name), samples)
    for name in benchmark.suites:
        yield name, [_as_conversation(record) for record in evenly_spaced(benchmark.test_records(name), samples)]


def slices_of(kept: dict[str, Basis], parts: dict[str, list[int]]) -> dict[str, list[torch.Tensor]]:
    """Columns of each kept basis, apart by who added them."""
    return {layer: list(basis.columns.split(parts[layer], dim=1)) for layer, basis in kept.items()}


def _as_conversation(record: Record) -> Record:
    turns = (*record.turns, Turn("assistant", record.answer or ""))
    return Record(record.id, record.media, turns, origin=record.origin)
