"""Turns to token ids: the processor's chat template, and the mask that lets only answers carry loss.

The mask comes from where rendered prefixes end in the tokens' bounds, never from a search for strings.
"""

from __future__ import annotations

import re
import signal
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from mllm_keeplora.data.media.video import Clip, ClipExtent
from mllm_keeplora.data.schema import IMAGE_MARK, MARKS, VIDEO_MARK, Record, Turn, marks_in
from mllm_keeplora.errors import UserError, first_line
from mllm_keeplora.models.causal.losses import IGNORED
from mllm_keeplora.models.causal.templates import STYLES

# Some templates tell the model today's date: learnt on Monday, a prompt would be another one on Tuesday.
DATE = (
    "{% macro strftime_now(form) %}{{ '26 Jul 2024' if form == '%d %b %Y' else '26 July 2024' if form == '%d %B %Y' "
    "else '2024-07-26' }}{% endmacro %}"
)
PATIENCE_S, LONGEST = 20, 1 << 20  # of a template: seconds, and characters that it makes of a question mark
KINDS = {IMAGE_MARK: "image", VIDEO_MARK: "video"}
MARK_OR_TEXT = re.compile(f"({MARKS.pattern})")
REMEMBERED = 1 << 15  # renderings; conversations of a domain share their first turns, and passes share conversations


class ChatPrompt:
    """Encode records with a processor's own chat template, or in a published style.

    Args:
        processor: of the base; its template is replaced where a style is named.
        style: `chat_template`, or a key of `STYLES`.
        ends: ids of the tokens at which generation stops, beside the tokenizer's own end mark.
        video: `native` shows clips by the processor's own input for them, `frames` as pictures; `auto` is native where
            the processor has such an input.

    Raises:
        UserError: no template, one that cannot be used, or `native` where no clip can be put.
    """

    def __init__(self, processor: Any, style: str = "chat_template", ends: Iterable[int] = (), video: str = "auto"):
        self.processor = processor
        if style in STYLES:
            processor.chat_template = STYLES[style]
        own = getattr(processor, "chat_template", None) or ""
        if "strftime_now" in own and DATE not in own:
            processor.chat_template = DATE + own
        self.tokenizer = processor.tokenizer
        self.ends = {self.tokenizer.eos_token_id, *ends} - {None}
        self._controls = re.compile("|".join(map(re.escape, _control_tokens(processor))) or "(?!)")
        self._widenings: dict[tuple[Extent, ...], int] = {}
        if not getattr(processor, "chat_template", None):
            raise UserError("the base's processor has no chat template, so its prompt is not known")
        _try_template(processor)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.is_native = video != "frames" and self._takes_clips()
        if video == "native" and not self.is_native:
            kind = type(processor).__name__
            raise UserError(
                f"base.video is native, but {kind} or its prompt has no place for clips; allowed: auto, frames"
            )

    def shown(self, record: Record) -> Record:
        """Give a record as it is put to the base: its clips whole, or as pictures."""
        return record if self.is_native else record.as_pictures()

    @property
    def background(self) -> tuple[int, int, int]:
        """The color around pictures that are padded to squares: the processor's mean, as LLaVA-1.5 takes it."""
        mean = getattr(getattr(self.processor, "image_processor", None), "image_mean", None) or (0.0, 0.0, 0.0)
        return tuple(int(255 * value) for value in mean)

    def training_batch(self, records: Sequence[Record], shown: Sequence[list], max_length: int | None) -> dict:
        """Make right-padded tensors of whole conversations with `labels` (b, t), IGNORED everywhere but on answers.

        Raises:
            UserError: a record is longer than `max_length` tokens, has no token that carries loss, or is refused by
                the base's processor.
        """
        texts = [self._render(record, len(record.turns)) for record in records]
        batch = self._inputs(records, texts, shown, side="right")
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        labels = batch["input_ids"].new_full(batch["input_ids"].shape, IGNORED)
        for row, (record, length) in enumerate(zip(records, lengths, strict=True)):
            if max_length is not None and length > max_length:
                raise UserError(f"{record.origin}: {length} tokens, train.max_length allows {max_length}")
            widened = self._widened(record, list(map(extent_of, shown[row])), texts[row], length)
            for start, stop in self._answer_spans(record, texts[row], widened):
                labels[row, start:stop] = batch["input_ids"][row, start:stop]
        is_silent = (labels == IGNORED).all(dim=1).tolist()
        for record, is_mute in zip(records, is_silent, strict=True):
            if is_mute and any(turn.trained for turn in record.turns):  # one that fills up trains nothing
                raise UserError(
                    f"{record.origin}: no token of the answer carries loss; does the chat template fit the base?"
                )
        batch["labels"] = labels
        return batch

    def question_batch(
        self, records: Sequence[Record], shown: Sequence[list], suffixes: Sequence[str] | None = None
    ) -> dict:
        """Make left-padded tensors of questions, ready for generation; each may have a suffix appended to its text."""
        ends = suffixes if suffixes is not None else [""] * len(records)
        texts = [self._render(record, _asked(record), end) for record, end in zip(records, ends, strict=True)]
        return self._inputs(records, texts, shown, side="left")

    def answers(self, tokens: Any) -> list[str]:
        """Decode generated tokens (b, new), without special tokens, outer spaces stripped."""
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def length(self, record: Record) -> int:
        """Count the text tokens of a question, without image tokens: the key for sorting by length."""
        return len(self._ids(self._render(record, _asked(record))))

    def trained_tokens(self, record: Record) -> int:
        """Count the tokens of a conversation that carry loss."""
        text = self._render(record, len(record.turns))
        return sum(stop - start for start, stop in self._answer_spans(record, text, [0] * len(record.turns)))

    def ends_answers(self, record: Record) -> bool:
        """Whether an end mark is among the trained tokens of every answer; without one nothing teaches when to stop."""
        text = self._render(record, len(record.turns))
        ids, spans = self._ids(text), self._answer_spans(record, text, [0] * len(record.turns))
        return all(self.ends.intersection(ids[start:stop]) for start, stop in spans)

    def total_tokens(self, record: Record, sizes: Sequence[Extent]) -> int:
        """Count the tokens of a conversation and what it shows, of which only the extents are needed."""
        with _refused(record, sizes):
            return len(self._ids(self._render(record, len(record.turns)))) + self._widening(tuple(sizes))

    def question_tokens(self, record: Record, sizes: Sequence[Extent], suffix: str = "") -> int:
        """Count the tokens of a question and what it shows, of which only the extents are needed."""
        with _refused(record, sizes):
            return len(self._ids(self._render(record, _asked(record), suffix))) + self._widening(tuple(sizes))

    def _widening(self, sizes: tuple[Extent, ...]) -> int:
        """How many more tokens what is shown, of these extents, takes in a record than its marks; found out once."""
        from PIL import Image

        if not sizes:
            return 0
        if sizes not in self._widenings:
            kinds = tuple("video" if isinstance(size, ClipExtent) else "image" for size in sizes)
            text = _rendered(self.processor, (Turn("user", "?"),), kinds, "", True)
            blank = [size.blank() if isinstance(size, ClipExtent) else Image.new("RGB", size) for size in sizes]
            batch = self._process([text], [blank], side="right")
            self._widenings[sizes] = batch["input_ids"].shape[1] - len(self._ids(text))
        return self._widenings[sizes]

    def _widened(self, record: Record, sizes: Sequence[Extent], text: str, length: int) -> list[int]:
        """Per turn: how many more tokens the images up to its end take in the processed ids than in the text.

        Raises:
            UserError: images stand in later turns, and what they take together is not what each takes alone.
        """
        total = length - len(self._ids(text))
        if not any(marks_in(turn.text) for turn in record.turns[_asked(record) :]):
            return [total] * len(record.turns)  # all images come before the first answer
        each, widened, shown = [self._widening((size,)) for size in sizes], [], 0
        for turn in record.turns:
            shown += marks_in(turn.text)
            widened.append(sum(each[:shown]))
        if widened[-1] != total:
            raise UserError(f"{record.origin}: {len(each)} images take {total} tokens together, {widened[-1]} alone")
        return widened

    def _answer_spans(self, record: Record, text: str, widened: Sequence[int]) -> list[tuple[int, int]]:
        """Token ranges of the trained answers; `widened[t]` tokens of images come before the end of turn t.

        An answer is what its turn adds to the rendered text; its tokens are those that cover any of these characters,
        so a space that the tokenizer draws into the answer's first word does not matter.
        """
        _, begins, ends = _encoded(self.tokenizer, text, self._adds_marks(text))
        spans = []
        for turn, each in enumerate(record.turns):
            if each.role != "assistant" or not each.trained:
                continue
            before = self._render(record, turn)
            after = self._render(record, turn + 1, generation=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(f"{record.origin}: the chat template is not the same for a prefix of the conversation")
            start = next((n for n, end in enumerate(ends) if end > len(before)), len(ends))
            stop = next((n for n, begin in enumerate(begins) if begin >= len(after)), len(begins))
            if start >= stop:
                raise UserError(f"{record.origin}: turn {turn}, an answer, has no token that could carry loss")
            spans.append((start + widened[turn], stop + widened[turn]))
        return spans

    def _render(self, record: Record, turns: int, suffix: str = "", generation: bool | None = None) -> str:
        """The chat template over the first `turns` turns; open for an answer if the last one is the user's.

        Raises:
            UserError: a text spells a token by which the base is controlled, which would not stay text.
        """
        shown = record.turns[:turns]
        for turn in shown:
            if (found := self._controls.search(MARKS.sub("", turn.text))) is not None:
                raise UserError(
                    f"{record.origin}: its text spells {found[0]!r}, a control token of the base, which would not stay "
                    "text; write it otherwise"
                )
        open_end = shown[-1].role == "user" if generation is None else generation
        marked = any(marks_in(turn.text) for turn in record.turns)
        first = () if marked else tuple("video" if each.is_clip else "image" for each in record.media)
        return _rendered(self.processor, shown, first, suffix, open_end)

    def _takes_clips(self) -> bool:
        """Whether the processor has an input for clips, and the template a place for them."""
        mark = getattr(self.processor, "video_token", None)
        if getattr(self.processor, "video_processor", None) is None or mark is None:
            return False
        return mark in _try_template(self.processor, ("video",))

    def _ids(self, text: str) -> Sequence[int]:
        return _encoded(self.tokenizer, text, self._adds_marks(text))[0]

    def _adds_marks(self, text: str) -> bool:
        """Whether the tokenizer shall add its own marks: not where the template has put the first one."""
        return not (self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token))

    def _inputs(self, records: Sequence[Record], texts: list[str], shown: Sequence[list], side: str) -> dict:
        """Have the processor make inputs; what it refuses is told with the record."""
        try:
            return self._process(texts, shown, side)
        except Exception:  # whatever it raises: find the record that it does not take
            for record, text, own in zip(records, texts, shown, strict=True):
                with _refused(record, list(map(extent_of, own))):
                    self._process([text], [own], side)
            raise

    def _process(self, texts: list[str], shown: Sequence[list], side: str) -> dict:
        pictures = [[each for each in own if not isinstance(each, Clip)] for own in shown]
        clips = [each for own in shown for each in own if isinstance(each, Clip)]
        moving = {}
        if clips:  # the frames are chosen: a processor samples no more, and prints their own seconds
            moving = {"videos": [each.frames for each in clips], "do_sample_frames": False}
            moving["video_metadata"] = [each.extent.metadata() for each in clips]
            if hasattr(self.processor.video_processor, "cap_pixels_per_frame"):  # whose default is about to change
                moving["cap_pixels_per_frame"] = False
        batch = self.processor(
            text=texts,
            images=pictures if any(pictures) else None,
            **moving,
            padding=True,
            padding_side=side,
            add_special_tokens=self._adds_marks(texts[0]),
            return_tensors="pt",
        )
        return {key: value for key, value in batch.items() if key != "labels"}


class PrefixPrompt(ChatPrompt):
    """Encode records for PaliGemma: pictures and question are a prefix that attends to itself both ways.

    `token_type_ids` tell prefix (0) from answer (1); without them an answer's token would see the ones that follow it
    while it is learnt. The processor adds a start mark and a line break to any text, so it is left out here.
    """

    def training_batch(self, records: Sequence[Record], shown: Sequence[list], max_length: int | None) -> dict:
        """Make the batch of `ChatPrompt`; everything from the first trained token on is causal."""
        batch = super().training_batch(records, shown, max_length)
        batch["token_type_ids"] = (batch["labels"] != IGNORED).int().cummax(dim=1).values.to(batch["input_ids"].dtype)
        return batch

    def _adds_marks(self, text: str) -> bool:
        return False

    def _process(self, texts: list[str], shown: Sequence[list], side: str) -> dict:
        processor, mark = self.processor, self.processor.image_token
        widened = [text.replace(mark, mark * processor.image_seq_length) for text in texts]
        batch = dict(
            self.tokenizer(widened, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt")
        )
        batch["token_type_ids"] = batch["input_ids"].new_zeros(batch["input_ids"].shape)
        pictures = [picture for each in shown for picture in each]
        if pictures:
            batch["pixel_values"] = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return batch


Extent = tuple[int, int] | ClipExtent  # width and height of a picture, or more of a clip


def extent_of(shown: Any) -> Extent:
    """Give what a picture's or clip's tokens depend on."""
    return shown.extent if isinstance(shown, Clip) else shown.size


def prompt_of(processor: Any, style: str, generation: Any = None, video: str = "auto") -> ChatPrompt:
    """Make the prompt of a base from its processor and the style that `prompt_style` gives.

    Its generation config, if it has one, names the tokens that end an answer.
    """
    ends = getattr(generation, "eos_token_id", None)
    kind = PrefixPrompt if style == "paligemma" else ChatPrompt
    return kind(processor, style, ends if isinstance(ends, list) else [] if ends is None else [ends], video)


@contextmanager
def _refused(record: Record, sizes: Sequence[Extent]) -> Iterator[None]:
    """Tell what a processor refuses, in whatever way, with the record and its pictures."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of whatever kind a processor raises
        shown = zip(record.media, sizes, strict=False)
        pictures = ", ".join(f"{media.path.name} of {size[0]} x {size[1]} pixels" for media, size in shown)
        told = f" ({pictures})" if pictures else ""
        raise UserError(f"{record.origin}: the base's processor refuses it{told}: {first_line(error)}") from error


def _try_template(processor: Any, first: tuple[str, ...] = ()) -> str:
    """Render one question: a template is a program, which comes with the base and may be broken or never end.

    transformers runs it where it sees nothing but the messages: no file, no import, no attribute of Python's own.

    Args:
        processor: has the template.
        first: what is shown before the question.

    Returns:
        Its text; nothing where the template itself refuses the question.

    Raises:
        UserError: it does not end, makes a text without measure, or is broken.
    """
    from jinja2 import TemplateError

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"it has not ended after {PATIENCE_S} s")

    is_timed = threading.current_thread() is threading.main_thread()  # signals reach no other
    before = signal.signal(signal.SIGALRM, give_up) if is_timed else None
    try:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE_S if is_timed else 0)
        text = _rendered(processor, (Turn("user", "?"),), first, "", True)
        if len(text) > LONGEST:
            raise ValueError(f"it makes {len(text):,} characters of one question mark")
        return text
    except Exception as error:  # of whatever kind: it computes what it likes
        if type(error) is not TemplateError:  # which a template raises itself, of a question that it does not take
            raise UserError(f"the base's chat template cannot be used: {first_line(error)}") from error
        return ""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if is_timed:
            signal.signal(signal.SIGALRM, before)


def _control_tokens(processor: Any) -> list[str]:
    """Name the tokens that make up a base's prompts, longest first; the mark of an image is the reader's business.

    Special tokens of another use, such as those of boxes, may stand in a text.
    """
    tokenizer, template = processor.tokenizer, str(getattr(processor, "chat_template", None) or "")
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, getattr(processor, "image_token", None)}
    names |= {name for name in added if name in template}
    return sorted(
        (name for name in names - {None, "", IMAGE_MARK} if name.strip()), key=lambda name: (-len(name), name)
    )


def _asked(record: Record) -> int:
    """How many turns come before the first answer."""
    return next((number for number, turn in enumerate(record.turns) if turn.role == "assistant"), len(record.turns))


@lru_cache(REMEMBERED)
def _rendered(processor: Any, turns: tuple[Turn, ...], first: tuple[str, ...], suffix: str, open_end: bool) -> str:
    """Turns as the template puts them; images and videos of `first` come before the first question, others at marks."""
    messages = []
    for turn in turns:
        parts: list[dict] = []
        if turn.role == "user":
            parts, first = [{"type": kind} for kind in first], ()
        pieces = MARK_OR_TEXT.split(turn.text + suffix if turn.role == "user" else turn.text)
        for piece in pieces:
            if piece in KINDS:
                parts.append({"type": KINDS[piece]})
            elif piece or len(pieces) == 1:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": turn.role, "content": parts})
    return processor.apply_chat_template(messages, add_generation_prompt=open_end, tokenize=False)


@lru_cache(REMEMBERED // 4)
def _encoded(tokenizer: Any, text: str, add_special_tokens: bool) -> tuple[array, array, array]:
    """Ids, first characters and ends of tokens, in arrays: thousands are kept. Marks that are added cover nothing."""
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    begins, ends, reached = array("i"), array("i"), 0
    for begin, end in encoded["offset_mapping"]:
        is_read = begin < end  # else a mark that was added
        begins.append(begin if is_read else reached)
        ends.append(end if is_read else reached)
        reached = max(reached, end)
    return array("i", encoded["input_ids"]), begins, ends
