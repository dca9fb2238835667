"""One question to a saved run, a model or an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.data.media.images import read_image
from mllm_keeplora.data.schema import IMAGE_MARK, Media, Record, Turn
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.checkpoints import Checkpoint
from mllm_keeplora.eval.harness import generate
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.models.shipped import NOTES, Notes
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
    """Answer a question about pictures greedily, put as it is: no prompt suffix of a benchmark is added.

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
    for option, given in ({"--base": base} if is_run else {"--after": after, "--domain": domain}).items():
        if given is not None:
            raise UserError(f"{target} is {'a run' if is_run else 'not a run'}, for which there is no {option}")
    # Pictures are shown as in training, where the target tells; they are looked at before a model is loaded.
    saved, notes = load_run(target) if is_run else None, Path(target) / NOTES
    if saved is not None:
        modes = {part.image_mode for part in saved.benchmark.domains.values()}
    else:
        modes = files.read_json(notes, Notes).get("image_modes", ()) if notes.is_file() else ()
    media = tuple(Media("image", Path(image), pad="pad" in modes) for image in images)
    for each in media:
        read_image(each)
    if saved is not None:
        saved.refuse_domain(domain, after)
        opened, model = saved.base, saved.restore(after, domain)
    else:
        checkpoint = Checkpoint.named(target, base)
        opened, model = checkpoint.load(checkpoint.config("mini_dcl", Path("runs/ask")))  # touches no data and folder
    record = Record("question", media, (Turn("user", question),), origin="the question")
    return generate(opened, model, [record], [""], max_new_tokens)[0].text
