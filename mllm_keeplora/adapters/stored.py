"""Read from a run directory what its model is after N units: pristine base plus stored factors, by the manifests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mllm_keeplora import files
from mllm_keeplora.adapters.factors import Factors
from mllm_keeplora.errors import UserError
from mllm_keeplora.runs import DomainDir, RunDir, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.linalg import Basis

COMBINE = ("merge",)
FORGOTTEN = "|forgotten"  # after a layer's name: which of its earlier columns were given up


def write_manifest(unit: DomainDir, combine: str, start_from: str) -> None:
    """State how this unit's branch combines with the earlier ones at answering time, and which files hold it."""
    manifest: dict[str, Any] = {"combine": combine, "start_from": start_from, "adapter": unit.adapter.name}
    if unit.projector.is_file():
        manifest["projector"] = unit.projector.name
    files.write_json(unit.manifest, manifest)


def past_of(run: RunDir, units: list[Unit]) -> tuple[list[Factors], list[dict[str, Tensor]]]:
    """Factors and full-parameter deltas that make the model after the given units, in order.

    Raises:
        UserError: a unit is not finished, or combines in a way that this version does not know.
    """
    factors: list[Factors] = []
    full: list[dict[str, Tensor]] = []
    for unit in units:
        folder = run.folder(unit)
        if not folder.manifest.is_file():
            raise UserError(f"{run.path} has not finished {unit.name}: {folder.manifest.name} is missing")
        manifest = files.read_json(folder.manifest)
        if manifest["combine"] not in COMBINE:
            raise UserError(f"{folder.manifest}: combine {manifest['combine']!r} is not one of {', '.join(COMBINE)}")
        if manifest["start_from"] == "base":
            factors, full = [], []
        factors.append(Factors.load(folder.adapter))
        if "projector" in manifest:
            full.append(files.read_tensors(folder.projector))
    return factors, full


def save_growth(
    folder: DomainDir, kept: dict[str, Basis], before: dict[str, int], forgotten: dict[str, list[int]]
) -> None:
    """Write how a domain changed each kept basis: the columns that it added, and which earlier ones it gave up.

    Args:
        folder: of the domain.
        kept: bases after the domain.
        before: columns of each before it.
        forgotten: layer -> columns that were given up, counted in the grown basis.
    """
    import torch

    tensors = {}
    for layer, basis in kept.items():
        earlier = [column for column in forgotten.get(layer, ()) if column < before[layer]]
        tensors[layer] = basis.columns[:, before[layer] - len(earlier) :]
        if earlier:
            tensors[layer + FORGOTTEN] = torch.tensor(earlier)
    files.write_tensors(folder.basis, tensors)


def parts_of(run: RunDir, units: list[Unit]) -> dict[str, list[int]]:
    """Columns of every kept basis by who added them: before the first unit, then each unit. Forgotten ones are gone."""
    return {
        layer: [owners.count(number) for number in range(len(units) + 1)]
        for layer, (_, owners) in _kept(run, units).items()
    }


def kept_of(run: RunDir, units: list[Unit]) -> dict[str, Basis]:
    """Kept basis of every target layer after the given units: what prepare kept, plus what each unit added."""
    from mllm_keeplora.linalg import Basis

    return {layer: Basis.from_columns(columns) for layer, (columns, _) in _kept(run, units).items()}


def _kept(run: RunDir, units: list[Unit]) -> dict[str, tuple[Tensor, list[int]]]:
    """Columns of every kept basis, and for each the number of the unit that added it (0: before the first)."""
    import torch

    if not run.kept_by_prepare.is_file():
        return {}
    found = {name: (each, [0] * each.shape[1]) for name, each in files.read_tensors(run.kept_by_prepare).items()}
    for number, unit in enumerate(units, start=1):
        stored = files.read_tensors(run.folder(unit).basis)
        for layer, (columns, owners) in found.items():
            gone = set(stored[layer + FORGOTTEN].tolist()) if layer + FORGOTTEN in stored else set()
            stay = [column for column in range(len(owners)) if column not in gone]
            added = stored[layer]
            columns = torch.cat([columns[:, stay] if gone else columns, added], dim=1)
            found[layer] = columns, [owners[column] for column in stay] + [number] * added.shape[1]
    return found
