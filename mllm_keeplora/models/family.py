"""What differs between kinds of base: how records become batches, what a loss is, how a question is answered.

Whatever probes, trains or asks a model works through a `Family` and knows no head, no label and no generation; checks
of chat templates and the export of a processor know the causal kind. A batch is a dictionary of tensors, a row for each
record: `labels` is what losses are made of, everything else goes into the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mllm_keeplora.data.schema import Record

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mllm_keeplora.models.causal.parts import Parts

Batch = dict[str, "Tensor"]


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text, is_cut: without special tokens and outer spaces; it reached the limit without an end.
        is_close: a near tie, which the other rows of a batch could tip by rounding.
    """

    text: str
    is_cut: bool
    is_close: bool = False


@dataclass(frozen=True)
class Sizes:
    """What a base takes in passes, for estimates of memory.

    Attributes:
        saved: bytes that the graph saves for each token.
        input_widths: of the distinct inputs of target layers.
        blocks: how many a token goes through; `width` of what is kept between them where gradients are checkpointed.
        loss: bytes for each number that carries loss.
        cached: bytes kept for each token while answers are made.
    """

    saved: float
    input_widths: tuple[int, ...]
    blocks: int
    width: int
    loss: float
    cached: float


class Family(Protocol):
    """One kind of base; `Base.family` is the one of a loaded base.

    Where a `model` is asked for, its peft form is as good, except in `question_features` and `rows_by_question`.
    """

    def name_parts(self, model: Any, projector: str, target: str | Sequence[str]) -> Parts:
        """Name towers, target layers and their depths; `adapters.projector` and `adapters.target` choose the layers."""

    def training_batch(self, records: Sequence[Record], max_length: int | None = None) -> Batch:
        """Turn records into model inputs with `labels`; UserError where one is longer than `max_length` tokens."""

    def question_batch(self, records: Sequence[Record], suffixes: Sequence[str] | None = None) -> Batch:
        """Turn questions into model inputs without `labels`; each may have a suffix appended to its text."""

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Batch:
        """Put two training batches together as one."""

    def length(self, record: Record) -> int:
        """Say how long a question is: batches are made of questions of about the same length."""

    def token_kinds(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mark what counts in a batch by its kind: masks of one shape (b, t) or (b,), no place in two of them."""

    def passing(self, model: Any, gradients: bool = False) -> AbstractContextManager:
        """Prepare a model for a data pass.

        Without `gradients` the head is skipped. With them the graph starts at the inputs, as no weight needs any.
        """

    def supervised(self, model: Any, labels: Tensor) -> AbstractContextManager:
        """Let a model give logits (1, n, classes) of what carries loss alone, in the order of the labels."""

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of everything that carries one, and whose it is.

        Args:
            logits: as under `supervised`.
            labels: of the batch.

        Returns:
            (n,) float32, and the row of the batch that each belongs to, (n,).
        """

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], limit: int, keep_rows: Callable[[Tensor], None]
    ) -> list[Answer]:
        """Answer a batch of questions by what is likeliest, in at most `limit` tokens.

        `keep_rows` is called with the places (n,) of unfinished rows, just before the batch shrinks to them.
        """

    def question_features(self, model: Any, batch: Mapping[str, Tensor], pictures: bool = True) -> Tensor:
        """Give what frozen parts see in questions, (b, d) float32, of which gates and routers decide."""

    def feature_sizes(self, model: Any, pictures: bool = True) -> tuple[int, int]:
        """Say how many of `question_features` are of words, and how many of pictures."""

    def rows_by_question(self, model: Any, batch: Mapping[str, Tensor], rows: int) -> Tensor:
        """Say how many of a projector's input rows belong to each question, (b,)."""

    def sizes(self, model: Any, parts: Parts, dtype: torch.dtype) -> Sizes:
        """Count what a base takes, from its skeleton, which must not be used afterwards."""


def inputs_of(batch: Mapping[str, Tensor]) -> Batch:
    """Leave out the labels: what remains goes into the model."""
    return {key: value for key, value in batch.items() if key != "labels"}


def mean_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Give the mean of values (n,) by the row that each belongs to: (count,)."""
    return values.new_zeros(count).index_add(0, rows, values) / rows.bincount(minlength=count)
