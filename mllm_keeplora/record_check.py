"""Records as the model will see them: which tokens they become, which are trained, and what is wrong with that."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_keeplora.data import Record
from mllm_keeplora.data.images import image_size, images_of
from mllm_keeplora.errors import UserError
from mllm_keeplora.models import IGNORED, ChatPrompt
from mllm_keeplora.models.base import prompt_of

if TYPE_CHECKING:
    from rich.console import RenderableType

ALIKE_ONLY = {"MllamaProcessor"}  # fail on batches of which only some records have pictures


def load_prompt(location: str, style: str) -> ChatPrompt | None:
    """The prompt of a base whose processor is on this machine; None where it would have to be downloaded."""
    from transformers import AutoProcessor, GenerationConfig

    from_hub = not Path(location).is_dir()
    try:
        processor = AutoProcessor.from_pretrained(location, local_files_only=from_hub)
    except (OSError, ValueError, ImportError) as error:
        if not Path(location).is_dir() and not isinstance(error, ImportError):
            return None
        raise UserError(f"base {location}: its processor cannot be loaded: {str(error).splitlines()[0]}") from None
    generation = None
    with contextlib.suppress(OSError):  # a folder may have none
        generation = GenerationConfig.from_pretrained(location, local_files_only=from_hub)
    return prompt_of(processor, style, generation)


def token_faults(
    prompt: ChatPrompt,
    records: Iterable[Record],
    max_length: int | None,
    advance: Callable[[int], None] = lambda n: None,
) -> Iterator[str]:
    """A sentence for each training record that trains no token, or that is longer than the limit.

    Args:
        prompt: of the base.
        records: training records.
        max_length: most tokens of a record, image tokens included; None for no limit.
        advance: told after every record.
    """
    seeing: set[bool] = set()
    for record in records:
        seeing.add(bool(record.media))
        if len(seeing) == 2 and type(prompt.processor).__name__ in ALIKE_ONLY:
            yield f"{record.origin}: this base cannot batch records with pictures and records without; part them"
            return
        try:
            if prompt.trained_tokens(record) == 0:
                yield f"{record.origin}: no token of its answers carries loss; does the chat template fit the base?"
            elif not prompt.ends_answers(record):
                yield (
                    f"{record.origin}: the base's chat template puts no end mark after an answer, so that nothing "
                    "would teach it to stop; choose another base.prompt"
                )
                return  # the same for every record
            elif max_length is not None:
                length = prompt.total_tokens(record, [image_size(media) for media in record.media])
                if length > max_length:
                    yield (
                        f"{record.origin}: {length} tokens, train.max_length allows {max_length}; cutting would take "
                        "image or answer tokens, so raise the limit or leave the record out"
                    )
        except UserError as error:
            if record.origin in str(error):  # a picture that cannot be read is told already
                yield str(error)
        advance(1)


def as_seen(prompt: ChatPrompt, record: Record) -> RenderableType:
    """A training record as the model will see it: prompt with the trained tokens marked, pictures, token counts."""
    from rich.console import Group
    from rich.text import Text

    pictures = images_of(record, prompt.background)
    batch = prompt.training_batch([record], [pictures], None)
    tokens, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    text = Text()
    for part, is_trained in _runs(tokens, [label != IGNORED for label in labels]):
        text.append(_shortened(prompt, part), style="bold green" if is_trained else "")
    trained = sum(label != IGNORED for label in labels)
    facts = [f"{record.origin}, id {record.id or '-'}"]
    facts += [f"picture {media.path.name}: {picture.width} x {picture.height} pixels as the processor gets it"
              for media, picture in zip(record.media, pictures, strict=True)]  # fmt: skip
    shapes = [f"{key} {tuple(value.shape)}" for key, value in batch.items() if value.ndim > 2]
    facts += [f"pixel values {', '.join(shapes)}"] if shapes else []
    facts += [f"{len(tokens)} tokens, {trained} of them trained (green)"]
    return Group(*(Text(fact, style="dim") for fact in facts), text)


def _runs(tokens: list[int], trained: list[bool]) -> Iterator[tuple[list[int], bool]]:
    """Consecutive tokens that are trained alike."""
    start = 0
    for position in range(1, len(tokens) + 1):
        if position == len(tokens) or trained[position] != trained[start]:
            yield tokens[start:position], trained[start]
            start = position


def _shortened(prompt: ChatPrompt, tokens: list[int]) -> str:
    """Text of tokens; a long row of the same token (a picture's patches) as one with its count."""
    from itertools import groupby

    texts: list[str] = []
    plain: list[int] = []
    for token, same in groupby(tokens):
        count = len(list(same))
        if count > 3:
            texts += [prompt.tokenizer.decode(plain), f"[{prompt.tokenizer.decode([token]).strip()} x {count}]"]
            plain = []
        else:
            plain += [token] * count
    return "".join([*texts, prompt.tokenizer.decode(plain)])
