"""One question to a saved run, a model or an adapter; of a dual encoder, which of some classes a picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mllm_keeplora.adapters.stored import is_oracle
from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.media.images import images_of
from mllm_keeplora.data.media.sampling import VideoOptions
from mllm_keeplora.data.naming import PROMPTS
from mllm_keeplora.data.schema import IMAGE_MARK, MARKS, VIDEO_MARK, Media, Record, Turn
from mllm_keeplora.errors import UserError, known, shortened
from mllm_keeplora.eval.checkpoints import Checkpoint
from mllm_keeplora.eval.harness import generate
from mllm_keeplora.eval.saved import SavedRun, load_run
from mllm_keeplora.models.base import family_of
from mllm_keeplora.models.dual import DualFamily
from mllm_keeplora.models.shipped import notes_of, resolve
from mllm_keeplora.system.given import half_character

TOLD = 5  # classes of a picture


def ask(
    target: str | Path,
    question: str | None = None,
    images: Sequence[Path] = (),
    after: int | None = None,
    base: str | None = None,
    max_new_tokens: int = 128,
    domain: str | None = None,
    classes: Sequence[str] | None = None,
    videos: Sequence[Path] = (),
) -> str:
    """Answer a question about pictures and clips greedily, put as it is: no prompt suffix of a benchmark is added.

    Args:
        target: a run directory, a model, or a peft adapter's folder.
        question: may hold `<image>` and `<video>` marks, one for each; without any the pictures come first, then the
            clips. None for a dual encoder, which is shown one picture.
        images: files.
        after: of a run: number of learnt units; None for all.
        base: of an adapter that does not name its own.
        max_new_tokens: longest answer.
        domain: whose branch answers, of a run where each domain has its own; of a dual encoder, whose classes compete.
        classes: that compete, of a dual encoder.
        videos: clips; their frames are chosen as the target's own domains say.

    Returns:
        The answer; of a dual encoder the likeliest classes with their probabilities, a line each.

    Raises:
        UserError: an unreadable picture or clip, marks that do not fit them, a question to a dual encoder or classes
            for another base, a checkpoint that cannot be loaded.
    """
    is_run = (Path(target) / "run.json").is_file()
    for option, given in ({"--base": base} if is_run else {"--after": after, "--domain": domain}).items():
        if given is not None:
            raise UserError(f"{target} is {'a run' if is_run else 'not a run'}, for which there is no {option}")
    saved = load_run(target) if is_run else None
    checkpoint = None if is_run else Checkpoint.named(target, base)
    config = saved.config if saved is not None else checkpoint.config("mini_dcl", Path("runs/ask"))  # touches no data
    compares = issubclass(family_of(config.base, resolve(config.base)), DualFamily)
    if compares:
        _refuse_question(target, question, images, videos)
        record = Record("picture", (), (Turn("user", ""),), classes=_class_list(target, saved, domain, classes))
        # The domain names classes; it has a branch of its own only where all have.
        domain = domain if saved is not None and is_oracle(saved.run, saved.first(after)) else None
    else:
        _refuse_unfit(target, question, images, videos, classes)
        record = Record("question", (), (Turn("user", question),), origin="the question")

    # Pictures are shown as in training, where the target tells; they are looked at before a model is loaded.
    if saved is not None:
        modes, video = {part.image_mode for part in saved.benchmark.domains.values()}, saved.benchmark.video
    else:
        notes = notes_of(target)
        modes, video = notes.get("image_modes", ()), notes.get("video", VideoOptions())
    shown = {
        IMAGE_MARK: [Media("image", Path(image), pad="pad" in modes) for image in images],
        VIDEO_MARK: [Media("video", Path(clip), video=video) for clip in videos],
    }
    places = MARKS.findall(question or "") or [mark for mark, media in shown.items() for _ in media]
    record = replace(record, media=tuple(shown[mark].pop(0) for mark in places))
    images_of(record)
    if saved is not None:
        saved.refuse_domain(domain, after)
        opened, model = saved.base, saved.restore(after, domain)
    else:
        opened, model = checkpoint.load(config)
    if compares:
        ranked = opened.family.ranked(model, record, TOLD)
        return "\n".join(f"{100 * probability:5.1f} %  {name}" for name, probability in ranked)
    return generate(opened, model, [record], [""], max_new_tokens)[0].text


def _refuse_unfit(
    target: str | Path,
    question: str | None,
    images: Sequence[Path],
    videos: Sequence[Path],
    classes: Sequence[str] | None,
) -> None:
    """Refuse what is no question about the pictures and clips."""
    if classes is not None:
        raise UserError(f"{target} answers questions; --classes are for a base that compares pictures with texts")
    if question is None or not question.strip():
        raise UserError("the question is empty")
    if not MARKS.search(question):
        return
    for kind, mark, given in (("image", IMAGE_MARK, images), ("video", VIDEO_MARK, videos)):
        if question.count(mark) != len(given):
            what = "pictures" if kind == "image" else "clips"
            raise UserError(f"the question has {question.count(mark)} {kind} marks, but {len(given)} {what} are given")


def _refuse_question(target: str | Path, question: str | None, images: Sequence[Path], videos: Sequence[Path]) -> None:
    """Refuse whatever a dual encoder cannot be asked."""
    usage = f"use: mllm-keeplora ask {target} --image FILE --classes 'cat, dog'"
    if question is not None:
        raise UserError(f"{target} compares pictures with texts and cannot be asked {question!r}; {usage}")
    if len(images) != 1 or videos:
        got = f"{len(images)} and {len(videos)} clips" if videos else len(images)
        raise UserError(f"{target} is shown one picture, got {got}; {usage}")


def _class_list(
    target: str | Path, saved: SavedRun | None, domain: str | None, classes: Sequence[str] | None
) -> ClassList:
    """Give the classes that compete: those that are named, or a domain's."""
    if (classes is None) == (domain is None):
        raise UserError(f"{target} chooses from classes: give --classes 'cat, dog', or --domain of a run, and not both")
    if classes is not None:
        if len(set(classes)) < len(classes) or not all(classes):
            raise UserError(f"--classes must be names that differ, got {shortened(', '.join(map(repr, classes)))}")
        if half := half_character("".join(classes)):
            raise UserError(f"--classes must be text in UTF-8, got half a character, {half!a}")
        return ClassList.of(classes, PROMPTS)
    if domain not in saved.names:
        raise UserError(f"{target} has no --domain {domain!r}; known: {known(saved.names)}")
    return saved.benchmark.naming(domain).classes
