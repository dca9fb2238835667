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


def save_new_columns(folder: DomainDir, kept: dict[str, Basis], before: dict[str, int]) -> None:
    """Write the columns that a domain added to each kept basis."""
    files.write_tensors(folder.basis, {layer: basis.columns[:, before[layer] :] for layer, basis in kept.items()})


def parts_of(run: RunDir, units: list[Unit]) -> dict[str, list[int]]:
    """Columns of every kept basis by who added them: before the first unit, then each unit."""
    if not run.kept_by_prepare.is_file():
        return {}
    parts = {layer: [columns.shape[1]] for layer, columns in files.read_tensors(run.kept_by_prepare).items()}
    for unit in units:
        for layer, columns in files.read_tensors(run.folder(unit).basis).items():
            parts[layer].append(columns.shape[1])
    return parts


def kept_of(run: RunDir, units: list[Unit]) -> dict[str, Basis]:
    """Kept basis of every target layer after the given units: what prepare kept, plus what each unit added."""
    import torch

    from mllm_keeplora.linalg import Basis

    if not run.kept_by_prepare.is_file():
        return {}
    columns = files.read_tensors(run.kept_by_prepare)
    for unit in units:
        added = files.read_tensors(run.folder(unit).basis)
        columns = {layer: torch.cat([old, added[layer]], dim=1) for layer, old in columns.items()}
    return {layer: Basis.from_columns(each) for layer, each in columns.items()}
