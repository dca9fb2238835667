"""Stage `diagnose`: what a unit did to the model, measured right after it: room left, leak, interference, overlap.

Changes nothing. `report` turns the unit's `diagnostics.json` into tables and pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters import Factors
from mllm_keeplora.adapters.stored import kept_of, parts_of, updates_of
from mllm_keeplora.data import Record
from mllm_keeplora.data.collate import evenly_spaced
from mllm_keeplora.data.schema import Turn
from mllm_keeplora.probes.features import measure_inputs
from mllm_keeplora.runs import Unit
from mllm_keeplora.stages.learner import Learner
from mllm_keeplora.strategies.passes import own_batches
from mllm_keeplora.system import dealing, distributed, files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mllm_keeplora.linalg import Basis


def diagnose(learner: Learner, unit: Unit) -> dict[str, Any]:
    """Measure what the unit did to the model, on a few records of every set."""
    done = learner.units[: unit.index]
    learner.bring_to(unit.index, asked=unit.domains[0])
    parts, kept = parts_of(learner.run, done), learner.kept
    *earlier, factors = updates_of(learner.run, done)
    if learner.strategy.start_from == "base":
        earlier = []
    merged = learner.adapters.mode == "merged"
    dtype = next(learner.base.model.parameters()).dtype if merged else None
    before = kept_of(learner.run, done[:-1])
    slices = {layer: list(basis.columns.split(parts[layer], dim=1)) for layer, basis in kept.items()}
    facts = {
        "capacity": {  # columns kept before the first unit and added by each, and the directions left
            layer: {"d_in": basis.d_in, "parts": parts[layer], "free": basis.d_in - basis.rank}
            for layer, basis in kept.items()
        },
        "changes": changes_of(factors, earlier, learner.adapters.pristine, before, dtype),
        "inputs": {name: inputs_of(learner, records, factors, slices) for name, records in _sets(learner, unit)},
    }
    if distributed.is_main():
        files.write_json(learner.run.folder(unit).diagnostics, facts)
    return {}


def changes_of(
    factors: Factors,
    before: list[Factors],
    pristine: Callable[[str], Tensor],
    kept: dict[str, Basis],
    dtype: torch.dtype | None,
) -> dict[str, dict[str, float]]:
    """Measure each layer's update relative to its weight, and how much of it lies in what was to be protected.

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
        found["leak"] = found["leak_evaluated"] = leak(delta, kept[layer])
        for name, kind in (("leak_evaluated", dtype), ("leak_bfloat16", torch.bfloat16)):
            if kind is not None:
                found[name] = leak((past + delta).to(kind).float() - past.to(kind).float(), kept[layer])
        return found

    costs = {layer: float(kept[layer].rank if layer in kept else 1) * A.shape[1] for layer, A in factors.A.items()}
    return dealing.dealt(costs, pristine, look)


def inputs_of(
    learner: Learner, records: Sequence[Record], factors: Factors, slices: dict[str, list[Tensor]]
) -> dict[str, dict[str, Any]]:
    """Measure per layer how strongly the unit's update answers to the inputs that some records cause.

    Args:
        learner: has the model that runs now.
        records: training records.
        factors: of the unit.
        slices: per layer the kept columns (d_in, k), apart by who added them.

    Returns:
        `interference`, the mean of ||x dW^T|| / ||layer(x)||, and `covered`, the share of the inputs' energy inside
        each slice of the kept basis. Layers without inputs, as a projector's without pictures, are left out.
    """
    import torch

    def measure(layer: str) -> Callable[[Tensor, Tensor], Tensor]:
        def sums(inputs: Tensor, outputs: Tensor) -> Tensor:
            rows, answers = inputs.float(), outputs.float().norm(dim=-1).clamp(min=1e-12)
            ratio = rows.new_zeros(())
            if layer in factors.A:
                A, B = factors.A[layer].to(rows), factors.B[layer].to(rows)
                change = (rows @ A.mT) @ B.mT * factors.scaling(layer)
                ratio = (change.norm(dim=-1) / answers).sum()
            inside = [(rows @ columns.to(rows)).square().sum() for columns in slices.get(layer, [])]
            return torch.stack([rows.new_tensor(rows.shape[0]), ratio, rows.square().sum(), *inside]).double()

        return sums

    base = learner.base
    layers = {layer: base.model.get_submodule(layer) for layer in base.parts.target_layers}
    inputs = own_batches(base.model, base.family.training_batch, records, learner.config.train.probe_batch_size)
    lengths = {layer: 3 + len(slices.get(layer, [])) for layer in layers}
    sums = measure_inputs(base.family, learner.adapters.model, layers, inputs, measure, lengths)
    return {
        layer: {"interference": float(values[1] / values[0]), "covered": (values[3:] / values[2]).tolist()}
        for layer, values in sums.items()
        if values[0] > 0
    }


def _sets(learner: Learner, unit: Unit) -> Iterator[tuple[str, Sequence[Record]]]:
    """Name and training records: of the domains learnt so far, or of all, and of the suites."""
    samples, benchmark = learner.config.diagnostics.samples, learner.benchmark
    for each in learner.units:
        if learner.config.eval.domains == "all" or each.index <= unit.index:
            for name in each.domains:
                yield name, evenly_spaced(benchmark.train_records(name), samples)
    for name in benchmark.suites:  # its gold answers stand for what would be learnt
        yield (
            name,
            [
                replace(each, turns=(*each.turns, Turn("assistant", each.answer or "")))
                for each in evenly_spaced(benchmark.test_records(name), samples)
            ],
        )
