"""Lists of classes: what is wrong with them, missing of a published set, or too long for a text tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from mllm_keeplora.data import Benchmark, Record
from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.naming import untrained_classes
from mllm_keeplora.errors import UserError, shortened
from mllm_keeplora.models.dual.texts import ClassTexts


def class_faults(benchmark: Benchmark, name: str, every_class: bool = False) -> Iterator[str]:
    """Yield a sentence for each thing that is wrong with a domain's list of classes, or missing of its records.

    Args:
        benchmark: as a run has it.
        name: of a domain or suite; one without classes has no fault.
        every_class: whether each class must have a training record; in a set with `counts` each must in any case.

    Raises:
        UserError: classes or records cannot be read at all.
    """
    part, naming = benchmark.graded(name), benchmark.naming(name)
    if naming is None:
        return
    yield from naming.faults
    published, found = part.counts or {}, len(naming.classes.names)
    if published.get("classes", found) != found:
        yield f"{name}: {found} classes, but the published set has {published['classes']}"
    if part.counts is None and not every_class:
        return
    trained = _readable(partial(benchmark.train_records, whole=True), name) if name in benchmark.domains else None
    for role, records in (("train", trained), (benchmark.file_of(name), _readable(benchmark.test_records, name))):
        if records is not None and published.get(role, len(records)) != len(records):
            yield f"{name}: {len(records):,} {role} records, but the published set has {published[role]:,}"
    missing = untrained_classes(naming, trained) if trained is not None else ()
    if missing:
        yield f"{name}: no training record shows {shortened(', '.join(map(repr, missing)), 2000)}"


def _readable(read: Callable[[str], Sequence[Record]], name: str) -> Sequence[Record] | None:
    """Give records, or None where they have faults, which are told where the run itself reads them."""
    try:
        return read(name)
    except UserError:
        return None


def text_faults(benchmark: Benchmark, name: str, texts: ClassTexts) -> Iterator[str]:
    """Yield a sentence for each class of a set whose texts a dual encoder's text tower cannot read."""
    if (naming := benchmark.naming(name)) is None:
        yield f"{name}: its records name no class, but the base compares pictures with `classes` of a domain"
        return
    for fault in prompt_faults(naming.classes, texts.tokenizer, texts.positions):
        yield f"{name}: {fault}"


def padding_faults(options: Any, texts: ClassTexts) -> Iterator[str]:
    """Yield a sentence if padding is to count in features of a tower whose texts it would change."""
    if getattr(options, "feature_padding", False) and not (texts.full or texts.causal):
        yield (
            "strategy.feature_padding is true, but the text tower of this base attends to what follows a token, so "
            "padding without a mask would change its texts; allowed: false"
        )


def prompt_faults(classes: ClassList, tokenizer: Any, positions: int) -> Iterator[str]:
    """Yield a sentence for each class whose longest text has more tokens than a text tower has positions.

    A tokenizer would cut it without a word.

    Args:
        classes: of one domain or suite.
        tokenizer: of the base; marks of begin and end are counted as it puts them.
        positions: of the text tower: 77 of CLIP, 64 of SigLIP.
    """
    for name, texts in zip(classes.names, classes.texts, strict=True):
        lengths = list(map(len, tokenizer(list(texts))["input_ids"])) if texts else [0]
        if max(lengths) > positions:
            text = texts[lengths.index(max(lengths))]
            told = f"class {shortened(repr(name))}: {shortened(repr(text))}"
            yield f"{told} has {max(lengths)} tokens, the text tower has places for {positions}"
