"""Records as the model will see them: which tokens they become, which are trained, and what is wrong with that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING

from mllm_keeplora.data import Media, Record, TestSet
from mllm_keeplora.data.media.frames import kept_frames
from mllm_keeplora.data.media.images import Looks, shown_of
from mllm_keeplora.errors import UserError
from mllm_keeplora.metrics import SET_SCORERS, UNGRADED, score
from mllm_keeplora.models import IGNORED, ChatPrompt
from mllm_keeplora.models.base import family_of
from mllm_keeplora.models.causal import CausalFamily
from mllm_keeplora.models.causal.prompt import Extent, extent_of
from mllm_keeplora.models.reading import read_config, read_generation, read_processor
from mllm_keeplora.models.shipped import clip_input, prompt_style
from mllm_keeplora.system.known import Known, key_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mllm_keeplora.config import BaseConfig
    from mllm_keeplora.models.family import Family

RULES = 1  # of trying records: raised when they change, so that every record is tried anew
ALIKE_ONLY = {"MllamaProcessor"}  # fail on batches of which only some records have pictures
APART = {"SmolVLMProcessor"}  # fail on batches of pictures and of clips


def load_family(config: BaseConfig, location: str) -> Family | None:
    """Make the family of a base whose processor is on this machine; None where it would have to be downloaded."""
    from_hub = not Path(location).is_dir()
    trusted, here = config.trust_remote_code, {"local_files_only": from_hub}
    try:
        processor, settings = read_processor(location, trusted, **here), read_config(location, trusted, **here)
        kind = family_of(config, location, **here)
    except UserError as error:
        if from_hub and isinstance(error.__cause__, (OSError, ValueError)):
            return None
        raise
    return kind.of(processor, settings, prompt_style(config), read_generation(location, **here), clip_input(config))


def gold_faults(part: TestSet, records: Sequence[Record]) -> Iterator[str]:
    """Name the gold answers that the set's scorer cannot grade by: no option letter, no box, no ten human answers."""
    if part.scorer in UNGRADED:
        return
    for record in records:
        gold = record.answer if isinstance(record.answer, str) else record.answer[0]
        try:
            score(part.scorer, prediction=gold, answer=record.answer, question=record.question)
        except ValueError as error:
            yield f"{record.origin}: {error}"
        if part.scorer in SET_SCORERS:  # one is enough to see that its libraries are there
            return


@dataclass(frozen=True)
class ProcessorTrial:
    """Shows records to a base's processor, as a run will: each text, and each size of pictures once.

    Attributes:
        prompt: of the base.
        looks: what was seen of the pictures.
        positions: most tokens that the base has places for; None if it does not say.
        known: keeps which records have no fault.
    """

    prompt: ChatPrompt
    looks: Looks
    positions: int | None = None
    known: Known = field(default_factory=Known)

    def training_faults(
        self, records: Iterable[Record], max_length: int | None, advance: Callable[[int], None]
    ) -> Iterator[str]:
        """Yield a sentence for each training record that the processor refuses, that trains no token, or is too long.

        Args:
            records: of one domain.
            max_length: most tokens of a record, image tokens included; None for as many as the base has places.
            advance: told after every record.
        """
        limits = [each for each in (max_length, self.positions) if each is not None]
        limit = min(limits, default=None)
        allows = "train.max_length allows" if limit == max_length else "the base has places for"
        no_end = (
            "the base's chat template puts no end mark after an answer, so that nothing would teach it to stop; choose "
            "another base.prompt"
        )

        def fault(record: Record, sizes: list[Extent]) -> str | None:
            shown = self.prompt.shown(record)
            length = self.prompt.total_tokens(shown, sizes)
            if self.prompt.trained_tokens(shown) == 0:
                return "no token of its answers carries loss; does the chat template fit the base?"
            if not self.prompt.ends_answers(shown):
                return no_end
            if limit is not None and length > limit:
                return (
                    f"{length} tokens, {allows} {limit}; cutting would take image or answer tokens, so raise the limit "
                    f"or leave the record out{self._fitting(record, limit, self.prompt.total_tokens)}"
                )
            return None

        for record in records:
            told = self._tried(record, ("train", limit), fault)
            if told is not None:
                yield told
                if told.endswith(no_end):
                    return  # the same for every record
            advance(1)

    def question_faults(
        self, records: Iterable[Record], part: TestSet, advance: Callable[[int], None]
    ) -> Iterator[str]:
        """Yield a sentence for each question that the processor refuses, or that leaves no place for an answer.

        Args:
            records, part: of one set.
            advance: told after every record.
        """
        for record in records:
            suffix = part.suffix_for(record)

            def fault(record: Record, sizes: list[Extent], suffix: str = suffix) -> str | None:
                length = self.prompt.question_tokens(self.prompt.shown(record), sizes, suffix)
                if self.positions is None or length < self.positions:
                    return None
                fitting = self._fitting(record, self.positions - 1, partial(self.prompt.question_tokens, suffix=suffix))
                return (
                    f"{length} tokens, the base has places for {self.positions}, answer included; leave the question "
                    f"out{fitting}"
                )

            told = self._tried(record, ("test", self.positions, suffix), fault)
            if told is not None:
                yield told
            advance(1)

    def _tried(self, record: Record, how: tuple, fault: Callable[[Record, list[Extent]], str | None]) -> str | None:
        """Say what is wrong with a record, unless one with the same turns and sizes of pictures had no fault before."""
        shown = self.prompt.shown(record)
        try:
            sizes = list(map(self._extent, shown.media))
            key = self._prompt_key and key_of("record", RULES, self._prompt_key, how, shown.turns, sizes)
            if key and self.known.get(key) is not None:
                return None
            told = fault(record, sizes)
        except UserError as error:
            return str(error) if record.origin in str(error) else None  # a picture that cannot be read is told already
        if told is not None:
            return f"{record.origin}: {told}"
        if key:
            self.known.put(key)
        return None

    def _extent(self, media: Media) -> Extent:
        return kept_frames().clip(media).extent if media.is_clip else self.looks.size(media)

    def _extents(self, media: Media, frames: int) -> list[Extent]:
        """Give the extents of what is shown of a picture, or of a clip if it had so many frames."""
        if media.type == "image":
            return [self.looks.size(media)]
        if not self.prompt.is_native:
            return [self.looks.size(media)] * frames
        whole = kept_frames().clip(media).extent
        return [whole._replace(count=frames, times=whole.times[:frames])]

    def _fitting(self, record: Record, limit: int, tokens: Callable[[Record, list[Extent]], int]) -> str:
        """Tell how many frames of its clips a record that is too long has room for; nothing of one without clips."""
        most = max((media.video.frames for media in record.media if media.type == "video"), default=0)
        for count in range(most - 1, 0, -1):
            clips = [media.video and media.video.model_copy(update={"frames": count}) for media in record.media]
            media = tuple(replace(each, video=fewer) for each, fewer in zip(record.media, clips, strict=True))
            shown = self.prompt.shown(replace(record, media=media))
            sizes = [size for each in record.media for size in self._extents(each, count)]
            if tokens(shown, sizes) <= limit:
                return f", or set `video: {{frames: {count}}}`, which fits"
        return ""

    @cached_property
    def _prompt_key(self) -> bytes | None:
        """Everything that a record's tokens depend on beside it; None where it cannot be told."""
        import transformers

        processor, tokenizer = self.prompt.processor, getattr(self.prompt.tokenizer, "backend_tokenizer", None)
        if tokenizer is None:
            return None
        kinds = [f"{type(each).__module__}.{type(each).__qualname__}" for each in (self.prompt, processor)]
        told = [processor.chat_template, processor.to_json_string(), tokenizer.to_str(), sorted(self.prompt.ends)]
        special = [str(self.prompt.tokenizer.special_tokens_map), transformers.__version__]
        return key_of(kinds, told, special)


def mixed_faults(
    trained: Mapping[str, Sequence[Record]],
    graded: Mapping[str, Sequence[Record]],
    prompt: ChatPrompt | None,
    stage: int | None,
    joined: bool,
) -> Iterator[str]:
    """Yield a sentence for each set of unlike records, where the base or ZeRO-3 cannot have that.

    Unlike are those with and without pictures; for some bases, and under ZeRO-3, those with pictures and with clips.

    Args:
        trained, graded: whole sets by name.
        prompt: of the base; None if its processor is not known.
        stage: of ZeRO: in 3 processes wait for each other in the vision tower.
        joined: whether batches hold records of several domains.
    """
    processor = type(getattr(prompt, "processor", None)).__name__
    apart = prompt is not None and prompt.is_native and (processor in APART or stage == 3)
    if processor not in ALIKE_ONLY and stage != 3 and not apart:
        return
    sets: dict[str, Iterable[Record]] = {**trained, **{f"test of {name}": each for name, each in graded.items()}}
    if joined:
        sets["all domains together"] = chain.from_iterable(trained.values())
    for name, records in sets.items():
        kinds = {_shows(record, apart): record.origin for record in records}
        if processor in APART and stage != 3:
            kinds.pop("without", None)
        if len(kinds) > 1:
            why = (
                "under ZeRO-3 processes with unlike batches wait for each other for ever; split the domain, or "
                "take zero2"
                if stage == 3
                else "this base cannot batch them; part them"
            )
            told = " and ".join(f"{kind} ({origin})" for kind, origin in sorted(kinds.items()))
            yield f"{name} mixes records {told}: {why}"


def _shows(record: Record, apart: bool) -> str:
    if apart and any(media.type == "video" for media in record.media):
        return "with clips"
    return "with images" if record.media else "without"


def as_seen(family: Family, record: Record) -> RenderableType:
    """Show a training record as the model will see it: its text with what is trained marked, pictures, counts."""
    from rich.console import Group
    from rich.text import Text

    if not isinstance(family, CausalFamily):
        return _compared(family, record)
    prompt = family.prompt
    record = prompt.shown(record)
    pictures = shown_of(record, prompt.background)
    batch = prompt.training_batch([record], [pictures], None)
    tokens, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    text = Text()
    for is_trained, pairs in groupby(zip(tokens, labels, strict=True), lambda pair: pair[1] != IGNORED):
        text.append(_shortened(prompt, [token for token, _ in pairs]), style="bold green" if is_trained else "")
    trained = sum(label != IGNORED for label in labels)
    facts = [f"{record.origin}, id {record.id or '-'}"]
    for media, picture in zip(record.media, pictures, strict=True):
        what = f"picture {media.path.name}"
        if media.frame is not None:
            second = kept_frames().clip(media).times[media.frame]
            what = f"clip {media.path.name}, frame {media.frame + 1} of {media.video.frames} at {second:.2f} s"
        width, height, *more = extent_of(picture)
        if more:
            seconds = ", ".join(f"{second:.2f}" for second in picture.times)
            what = f"clip {media.path.name}, {len(picture.times)} frames at {seconds} s"
        facts.append(f"{what}: {width} x {height} pixels as the processor gets it")
    shapes = [f"{key} {tuple(value.shape)}" for key, value in batch.items() if value.ndim > 2]
    if shapes:
        facts.append(f"pixel values {', '.join(shapes)}")
    facts.append(f"{len(tokens)} tokens, {trained} of them trained (green)")
    return Group(*(Text(fact, style="dim") for fact in facts), text)


def _compared(family: Family, record: Record) -> RenderableType:
    """Show a picture's label among the classes that it is compared with."""
    from rich.text import Text

    batch = family.training_batch([record])
    shapes = ", ".join(f"{name} {tuple(values.shape)}" for name, values in batch.items())
    text = Text(f"{record.origin}, id {record.id or '-'}\n{shapes}\n", style="dim")
    for name, texts in zip(record.classes.names, record.classes.texts, strict=True):
        text.append(f"{texts[0]}\n", style="bold green" if name == record.turns[-1].text else "")
    return text


def _shortened(prompt: ChatPrompt, tokens: list[int]) -> str:
    """Text of tokens; a long row of the same token (a picture's patches) as one with its count."""
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
