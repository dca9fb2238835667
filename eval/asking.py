"""One question to a saved run, a model or an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_keeplora.data.media.images import read_image
from mllm_keeplora.data.schema import IMAGE_MARK, Media, Record, Turn
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.checkpoints import Checkpoint
from mllm_keeplora.eval.harness import generate
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.models import Base
from mllm_keeplora.models.shipped import NOTES
from mllm_keeplora.system import files


def ask(
    target: str | Path,
    question: str,
    images: Sequence[Path] = (),
    after: int | None = None,
    base: str | None = None,
    max_new_tokens: int = 128,
    domain: str | None = None,
) -> str:
    """Greedy answer to a question about pictures, put as it is: no prompt suffix of a benchmark is added.

    Args:
        target: a run directory, a model, or a peft adapter's folder.
        question: may hold `<image>` marks, one for each picture; without any the pictures come first.
        images: files.
        after: of a run: number of learnt units; None for all.
        base: of an adapter that does not name its own.
        max_new_tokens: longest answer.
        domain: whose branch answers, of a run where each domain has its own.

    Raises:
        UserError: an unreadable picture, marks that do not fit the pictures, a checkpoint that cannot be loaded.
    """
    marks = question.count(IMAGE_MARK)
    if marks not in (0, len(images)):
        raise UserError(f"the question has {marks} image marks, but {len(images)} pictures are given")
    if not question.strip():
        raise UserError("the question is empty")
    is_run = (Path(target) / "run.json").is_file()
    for option, given in (("--after", after), ("--domain", domain)):
        if not is_run and given is not None:
            raise UserError(f"{target} is not a run, for which there is no {option}")
    if is_run and base is not None:
        raise UserError(f"{target} is a run, for which there is no --base")
    pad = "pad" in _image_modes(Path(target))
    media = tuple(Media("image", Path(image), pad=pad) for image in images)
    for each in media:
        read_image(each)  # before a model is loaded
    opened, model = _opened(target, after, base, domain)
    record = Record("question", media, (Turn("user", question),), origin="the question")
    return generate(opened, model, [record], [""], max_new_tokens)[0].text


def _image_modes(target: Path) -> set[str]:
    """How pictures were shown in training, where the target tells."""
    if (target / "run.json").is_file():
        return {part.image_mode for part in load_run(target).benchmark.domains.values()}
    return set(files.read_json(target / NOTES)["image_modes"]) if (target / NOTES).is_file() else set()


def _opened(target: str | Path, after: int | None, base: str | None, domain: str | None) -> tuple[Base, Any]:
    if (Path(target) / "run.json").is_file():
        saved = load_run(target)
        saved.refuse_domain(domain, after)
        return saved.base, saved.restore(len(saved.run.finished_units) if after is None else after, domain)
    checkpoint = Checkpoint.named(target, base)
    return checkpoint.load(checkpoint.config("mini_dcl", Path("runs/ask")))  # neither data nor folder is touched
