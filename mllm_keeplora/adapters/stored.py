"""Read from a run directory what its model is after N units: pristine base plus stored factors, by the manifests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typing_extensions import NotRequired, TypedDict

from mllm_keeplora.adapters.factors import Factors, Replacement, concatenate
from mllm_keeplora.adapters.mixers import load_mixer, save_mixer
from mllm_keeplora.errors import UserError
from mllm_keeplora.runs import DomainDir, RunDir, Unit
from mllm_keeplora.system import distributed, files

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters.mixers.mixing import Mixer
    from mllm_keeplora.adapters.prototypes import Prototypes
    from mllm_keeplora.linalg import Basis

LIVE = ("gate", "route")  # weighed by the question: such branches cannot be merged
FORGOTTEN = "|forgotten"  # after a layer's name: which of its earlier columns were given up


class Manifest(TypedDict):
    """How a unit's branch combines with the earlier ones at answering time, and which files hold it."""

    combine: Literal["merge", "sum", "gate", "route", "oracle"]
    start_from: Literal["previous", "base"]
    adapter: NotRequired[Literal["adapter", "adapter_consolidated"]]
    instead_of: NotRequired[Literal["unit", "all"]]
    recalls: NotRequired[Literal["last", "all"]]
    carried: NotRequired[bool]
    projector: NotRequired[Literal["projector.safetensors", "projector_consolidated.safetensors"]]
    mixer: NotRequired[str]
    prototypes: NotRequired[str]


@dataclass
class Past:
    """What makes a model of the pristine base: branches and deltas of parameters trained in full, both in order.

    `mixer` weighs the branches by the question; None where they are summed. `prototypes` are of classes, by the digest
    of their list.
    """

    factors: list[Factors] = field(default_factory=list)
    full: list[dict[str, Tensor]] = field(default_factory=list)
    mixer: Mixer | None = None
    prototypes: dict[str, Prototypes] = field(default_factory=dict)

    def merged(self, purpose: str, without_prototypes: bool = False) -> tuple[list[Factors], list[dict[str, Tensor]]]:
        """Give branches and deltas for a purpose that needs one weight for all questions.

        Raises:
            UserError: how the branches combine depends on the question, or prototypes have no place there.
        """
        if self.prototypes and not without_prototypes:
            raise UserError(
                f"{purpose} has no place for the prototypes of this run's {len(self.prototypes)} lists of classes; "
                "--without-prototypes leaves them out, and answers will differ"
            )
        if self.mixer is not None:
            raise UserError(
                f"{purpose} cannot exist: how this run's branches combine depends on the question "
                f"({self.mixer.kind}), and no single weight stands for that; use eval and ask on the run itself"
            )
        return self.factors, self.full


def write_manifest(
    folder: DomainDir,
    combine: str,
    start_from: str,
    carried: bool,
    mixer: Mixer | None,
    replacement: Replacement | None = None,
    recalls: str = "none",
) -> None:
    """State how this unit's branch combines with the earlier ones at answering time, and which files hold it.

    Args:
        folder, combine, start_from, carried, mixer: of the unit, its strategy and its branch.
        replacement: is written, and answers in the place of what the unit trained; None: that itself answers.
        recalls: which trained branches the strategy reads when a further domain is learnt (`Strategy.recalls`).
    """
    manifest: dict[str, Any] = {"combine": combine, "start_from": start_from, "adapter": folder.adapter.name}
    if carried:
        manifest["carried"] = True
    if folder.projector.is_file():
        manifest["projector"] = folder.projector.name
    if replacement is not None:
        replacement.factors.save(folder.adapter_consolidated)
        manifest |= {"adapter": folder.adapter_consolidated.name, "instead_of": replacement.instead_of}
        if replacement.full is not None:
            files.write_tensors(folder.projector_consolidated, replacement.full)
            manifest["projector"] = folder.projector_consolidated.name
    if recalls != "none":
        manifest["recalls"] = recalls
    if folder.prototypes.is_file():
        manifest["prototypes"] = folder.prototypes.name
    if mixer is not None:
        save_mixer(folder.mixer, mixer)
        manifest["mixer"] = folder.mixer.name
    files.write_json(folder.manifest, manifest)


def past_of(run: RunDir, units: list[Unit], asked: str | None = None) -> Past:
    """Read what makes the model after the given units.

    Args:
        run, units: units in order, from the first.
        asked: the domain whose questions the model is to answer, where each is answered by its own branch (oracle);
            one that was not learnt, or a suite, is answered by the base.

    Raises:
        UserError: a unit is not finished; each domain has its own branch and `asked` is None.
    """
    manifest, answering = _manifest(run, units[-1]) if units else {}, units
    if manifest.get("combine") == "oracle":
        if asked is None:
            names = ", ".join(name for unit in units for name in unit.domains)
            raise UserError(f"{run.path} answers every domain by a branch of its own; name one with --domain: {names}")
        answering = [unit for unit in units if unit.domains == (asked,)]
    adapters, projectors = _standing(run, answering)
    past = Past([Factors.load(path) for path in adapters], [files.read_tensors(path) for path in projectors])
    for unit in answering:
        if "prototypes" in _manifest(run, unit):
            from mllm_keeplora.adapters.prototypes import Prototypes

            own = Prototypes.load(run.folder(unit).prototypes)
            past.prototypes[own.classes] = own
    if "mixer" in manifest:
        mixer = load_mixer(run.folder(units[-1]).mixer)
        past = mixer.summed(past) if manifest["combine"] == "sum" else replace(past, mixer=mixer)
    return past


def is_oracle(run: RunDir, units: list[Unit]) -> bool:
    """Whether the model after the given units depends on which domain is asked."""
    return bool(units) and _manifest(run, units[-1])["combine"] == "oracle"


def trained_of(run: RunDir, unit: Unit) -> tuple[Factors, dict[str, Tensor]]:
    """Read what a unit's training left, whatever answers: its branch, and deltas of parameters trained in full."""
    folder = run.folder(unit)
    full = files.read_tensors(folder.projector) if files.is_there(folder.projector) else {}
    return Factors.load(folder.adapter), full


def updates_of(run: RunDir, units: list[Unit]) -> list[Factors]:
    """Read what each unit added by itself; of a branch that stands for others, or of a sum weighed anew, its change."""
    found: list[Factors] = []
    before: Factors | None = None
    for number, unit in enumerate(units):
        manifest = _manifest(run, unit)
        factors = Factors.load(_answering(run.folder(unit), manifest))
        if manifest["combine"] == "sum" or manifest.get("instead_of") == "all":
            now, earlier = (concatenate(past_of(run, units[:count]).factors) for count in (number + 1, number))
            found.append(now.less(earlier))
        else:
            found.append(factors.less(before) if manifest.get("carried") and before is not None else factors)
        before = factors
    return found


def stored_files(run: RunDir, units: list[Unit]) -> dict[str, list[Path]]:
    """List the files that the state after some units needs: `answering`, and besides `learning` a further domain.

    What only `--after` an earlier unit, or an interrupted one, needs is not among them.
    """
    adapters, projectors = _standing(run, units)
    recalls = _manifest(run, units[-1]).get("recalls") if units else None
    recalled = [run.folder(unit) for unit in (units if recalls == "all" else units[-1:] if recalls else ())]
    weights, trained = (
        [path / name for path in folders for name in ("adapter_config.json", "adapter_model.safetensors")]
        for folders in (adapters, [folder.adapter for folder in recalled if folder.adapter not in adapters])
    )
    trained += [folder.projector for folder in recalled if folder.projector not in projectors]
    bases = [run.kept_by_prepare, *(run.folder(unit).basis for unit in units)]
    last = [run.folder(unit) for unit in units[-1:]]
    found = {
        "answering": weights
        + projectors
        + [run.folder(unit).prototypes for unit in units]
        + [folder.mixer for folder in last],
        "learning": bases + trained + [folder.strategy for folder in last],
    }
    return {use: [path for path in paths if path.is_file()] for use, paths in found.items()}


def _standing(run: RunDir, units: list[Unit]) -> tuple[list[Path], list[Path]]:
    """Folders of the branches, and files of the projector's deltas, that later units have not replaced; in order."""
    adapters, projectors = [], []
    for unit in units:
        folder, manifest = run.folder(unit), _manifest(run, unit)
        is_whole = manifest.get("instead_of") == "all"
        projector = folder.path / manifest["projector"] if "projector" in manifest else None
        if manifest["combine"] == "merge" and manifest["start_from"] == "base":
            adapters, projectors = [], []
        elif manifest.get("carried") or is_whole:
            adapters = []
        if is_whole and projector == folder.projector_consolidated:
            projectors = []
        adapters.append(_answering(folder, manifest))
        if projector is not None:
            projectors.append(projector)
    return adapters, projectors


def _answering(folder: DomainDir, manifest: dict[str, Any]) -> Path:
    """The folder of a unit's branch that answers: the trained one, or what stands in its place."""
    return folder.path / manifest.get("adapter", folder.adapter.name)


def _manifest(run: RunDir, unit: Unit) -> dict[str, Any]:
    path = run.folder(unit).manifest
    if not files.is_there(path):
        raise UserError(f"{run.path} has not finished {unit.name}: {path.name} is missing")
    return files.read_json(path, Manifest)


def save_growth(
    folder: DomainDir, kept: dict[str, Basis], before: dict[str, int], forgotten: dict[str, list[int]]
) -> None:
    """Write how a domain changed each kept basis: the columns that it added, and which earlier ones it gave up.

    Args:
        folder, kept: of the domain, and bases after it.
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
    """Count the columns of every kept basis by who added them: before the first unit, then each unit."""
    owned, numbers = _kept(run, units), range(len(units) + 1)
    return {layer: [owners.count(number) for number in numbers] for layer, (_, owners) in owned.items()}


def kept_of(run: RunDir, units: list[Unit]) -> dict[str, Basis]:
    """Put together the kept basis of every target layer: what prepare kept, plus what each unit added."""
    from mllm_keeplora.linalg import Basis

    device = distributed.device()  # the test of orthonormality takes as long as a decomposition
    return {layer: Basis.from_columns(each.to(device)).to("cpu") for layer, (each, _) in _kept(run, units).items()}


def _kept(run: RunDir, units: list[Unit]) -> dict[str, tuple[Tensor, list[int]]]:
    """Columns of every kept basis, and for each the number of the unit that added it (0: before the first)."""
    import torch

    if not files.is_there(run.kept_by_prepare):
        if run.is_done("prepare"):  # which leaves one in any case
            raise UserError(f"{run.kept_by_prepare} is missing; {run.remedy('prepare/basis.safetensors')}")
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
