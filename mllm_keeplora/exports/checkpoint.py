"""Checkpoints of a run that need none of this code: a merged model for transformers, its whole past as one for peft."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_keeplora.adapters import Factors, concatenate, merge_for_good
from mllm_keeplora.adapters.stored import past_of
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.saved import SavedRun, load_run
from mllm_keeplora.exports.card import model_card
from mllm_keeplora.models import Base
from mllm_keeplora.models.reading import read_config
from mllm_keeplora.models.shipped import NOTES, clip_input, hub_id, prompt_style, resolve
from mllm_keeplora.system import files, owners

if TYPE_CHECKING:
    from torch import Tensor

FORMS = ("merged", "adapter")
PREFIX = "base_model.model."


def export(
    run: str | Path | SavedRun,
    form: str,
    folder: Path,
    after: int | None = None,
    domain: str | None = None,
    without_prototypes: bool = False,
) -> None:
    """Write what a run has learnt as a checkpoint that plain transformers or peft loads.

    `merged` holds all weights in the dtype that the base is stored in, summed in float32 before the one cast, with
    processor, generation config and a model card. `adapter` holds the branches of all units as one, scales folded into
    B and ranks filled up with zeros to one size, beside the projector where it was trained itself.

    Args:
        run: a run directory, or an opened one.
        form: `merged` or `adapter`.
        folder: written whole or not at all; must not exist yet.
        after: number of learnt units; None for all that are finished.
        domain: the one to answer, of a run where each has a branch of its own.
        without_prototypes: leave out the prototypes of classes, for which no other library has a place.

    Raises:
        UserError: unknown form, a folder that exists, an unfinished unit; a run whose branches combine by the question.
    """
    saved = run if isinstance(run, SavedRun) else load_run(run)
    if form not in FORMS:
        raise UserError(f"--to must be {' or '.join(FORMS)}, got {form!r}")
    if folder.exists():
        raise UserError(f"{folder} exists already; export writes a new folder")
    after = len(saved.run.finished_units) if after is None else after
    saved.refuse_domain(domain, after)
    past = past_of(saved.run, saved.first(after), domain)
    purpose = "a merged checkpoint" if form == "merged" else "an adapter for plain peft"
    learnt = past.merged(purpose, without_prototypes)
    part = owners.staged(folder, "part")  # renamed when all is there
    with files.written(folder.parent):
        files.make_folder(part)
        try:
            (_merged if form == "merged" else _adapter)(saved, after, *learnt, part)
            files.put_in_place(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _merged(saved: SavedRun, after: int, past: list[Factors], full: list[dict[str, Tensor]], folder: Path) -> None:
    base = _stored_base(saved)
    merge_for_good(base.model, past, full)
    _name_as_on_the_hub(base.model)
    base.model.save_pretrained(folder)
    _keep_config(saved, folder)
    base.processor.save_pretrained(folder)
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    _describe(saved, after, folder, f"all weights, in {dtype}", "transformers")
    _refuse_broken(folder, base.model.state_dict())


def _adapter(saved: SavedRun, after: int, past: list[Factors], full: list[dict[str, Tensor]], folder: Path) -> None:
    from torch.nn.functional import pad

    if not past:
        raise UserError(
            f"{saved.run.path}: after 0 domains there is nothing to put into an adapter; use the base itself"
        )
    # All layers are filled up with zeros to one rank, which every loader of adapters understands; scaling stays 1.
    whole = concatenate(past)
    rank = max(whole.ranks.values())
    tensors = {f"{PREFIX}{layer}.lora_A.weight": pad(A, (0, 0, 0, rank - len(A))) for layer, A in whole.A.items()}
    tensors |= {f"{PREFIX}{layer}.lora_B.weight": pad(B, (0, rank - B.shape[1])) for layer, B in whole.B.items()}
    name = hub_id(saved.config.base.model) or resolve(saved.config.base)
    settings = {"peft_type": "LORA", "base_model_name_or_path": name, "r": rank}
    settings |= {"lora_alpha": rank, "lora_dropout": 0.0, "bias": "none"}
    settings |= {"target_modules": sorted(whole.A), "inference_mode": True}
    if full:
        base = _stored_base(saved)
        merge_for_good(base.model, [], full)
        settings["modules_to_save"] = base.family.projector_names(base.model)
        tensors |= {f"{PREFIX}{name}": base.model.get_parameter(name).detach() for name in full[0]}
    files.write_json(folder / "adapter_config.json", settings)
    files.write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    _describe(saved, after, folder, f"an adapter of rank {rank}", "peft")
    _refuse_broken(folder, tensors)


def _describe(saved: SavedRun, after: int, folder: Path, content: str, library: str) -> None:
    """Write a model card, and how the model was prompted: a folder would be asked by its own template else."""
    files.write_text(folder / "README.md", model_card(saved, after, content, library))
    modes = {part.image_mode for part in saved.benchmark.domains.values()}
    notes = {"prompt": prompt_style(saved.config.base), "image_modes": sorted(modes)}
    if (video := saved.benchmark.video) != VideoOptions():
        notes["video"] = video.model_dump()
    if (clips := clip_input(saved.config.base)) != "auto":
        notes["clips"] = clips
    files.write_json(folder / NOTES, notes)


def _stored_base(saved: SavedRun) -> Base:
    """Load the run's base, not quantised, in the dtype that its checkpoint is stored in."""
    config = read_config(resolve(saved.config.base), saved.config.base.trust_remote_code)
    dtype = config.dtype or config.get_text_config().dtype or "float32"
    changes = {"quantization": None, "dtype": str(dtype).removeprefix("torch.")}
    return saved.load_base(saved.config.base.model_copy(update=changes))


def _name_as_on_the_hub(model: Any) -> None:
    """Have weights saved under the names of the family's hub checkpoints, which engines and older versions read.

    transformers gives a checkpoint back the names that it was loaded by. Of one that it has written itself, those of a
    vision tower lack their `vision_model.` since it is no module any more.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)


def _keep_config(saved: SavedRun, folder: Path) -> None:
    """Put the base's own config.json beside its weights: transformers has written it as this version alone reads it."""
    from transformers.utils.hub import cached_file

    location = resolve(saved.config.base)
    own = Path(location) / "config.json"
    if not own.is_file():
        _, _, revision = saved.run.ledger.base["fingerprint"].partition("@")
        own = Path(cached_file(location, "config.json", revision=revision))
    if "quantization_config" not in files.read_json(
        own, files.OBJECT
    ):  # of weights that are stored quantised; these are not
        shutil.copyfile(own, folder / "config.json")


def _refuse_broken(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read back what was written: an empty or cut checkpoint must never pass for a whole one.

    Raises:
        RuntimeError: not as many numbers are there as should be (tied weights are stored once), or one is not finite.
    """
    from safetensors import safe_open

    expected = sum({tensor.data_ptr(): tensor.numel() for tensor in tensors.values()}.values())
    found = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_tensor(name)
                found += tensor.numel()
                if not tensor.isfinite().all():
                    raise RuntimeError(f"{path}: tensor {name} is not finite")
    if found != expected:
        raise RuntimeError(f"{folder}: {found} numbers were written, {expected} should have been")
