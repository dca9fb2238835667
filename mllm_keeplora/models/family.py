"""What differs between kinds of base: how records become batches, what a loss is, how a question is answered.

Whatever probes, trains or asks a model works through a `Family` and knows no head, no label and no generation; checks
of chat templates and the export of a processor know the causal kind. A batch is a dictionary of tensors, a row for each
record: `labels`, and `allowed` where classes differ by record, are what losses are made of; the rest goes into the
model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from mllm_keeplora.data.schema import Record

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Batch = dict[str, "Tensor"]
OF_LOSSES = ("labels", "allowed")


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text, is_cut: without special tokens and outer spaces; it reached the limit without an end.
        is_close: a near tie, which the other rows of a batch could tip by rounding.
        probability, second: of a class that was chosen from a list, and the second likeliest.
    """

    text: str
    is_cut: bool
    is_close: bool = False
    probability: float | None = None
    second: str | None = None


@dataclass(frozen=True)
class Sizes:
    """What a base takes in passes, for estimates of memory.

    Attributes:
        saved: bytes that the graph saves for each token.
        input_widths: of the distinct inputs of target layers.
        blocks: how many a token goes through; `width` of what is kept between them where gradients are checkpointed.
        loss: bytes for each number that carries loss.
        cached: bytes kept for each token while answers are made.
        text: bytes that the graph saves for each class's text, once a batch.
    """

    saved: float
    input_widths: tuple[int, ...]
    blocks: int
    width: int
    loss: float
    cached: float
    text: float = 0.0


class Parts(Protocol):
    """Parts of a base by exact module names."""

    projectors: tuple[str, ...]

    @property
    def target_layers(self) -> tuple[str, ...]:
        """The linear layers that get an adapter."""

    def tower(self, layer: str) -> str | None:
        """Name the tower of a target layer: `language`, `vision` or `text`; None for a projector's."""

    def depth(self, layer: str) -> int | None:
        """Give the index of the block, within its own tower, that a target layer belongs to; None for a projector's."""


class Family(Protocol):
    """One kind of base; `Base.family` is the one of a loaded base.

    Where a `model` is asked for, its peft form is as good, except in `question_features`, `question_states` and
    `rows_by_question`.

    Attributes:
        auto: name of the class of transformers that loads such bases.
        processor: of the base.
    """

    auto: ClassVar[str]

    @property
    def processor(self) -> Any:
        """The base's processor."""

    @classmethod
    def of(cls, processor: Any, config: Any, style: str, generation: Any) -> Family:
        """Make the family of a base from its processor, its config, how it is prompted and its generation config."""

    def name_parts(self, model: Any, projector: str, target: str | Sequence[str]) -> Parts:
        """Name towers, target layers and their depths; `adapters.projector` and `adapters.target` choose the layers."""

    def summary(self, model: Any, parts: Parts) -> list[str]:
        """Tell of each part in a line, with the kinds of target layers, their number and shapes (d_out, d_in)."""

    def projector_names(self, model: Any) -> list[str]:
        """Name the modules that `adapters.projector: full` trains, of a list of modules each for itself."""

    def vocabulary(self, model: Any) -> int | None:
        """Say how many tokens the base has embeddings of; None if that is not known."""

    def sees_pictures(self, layer: str) -> bool:
        """Whether a target layer's rows are of pictures alone, in a tower of their own."""

    def training_batch(self, records: Sequence[Record], max_length: int | None = None) -> Batch:
        """Turn records into model inputs with `labels`; UserError where one is longer than `max_length` tokens."""

    def question_batch(self, records: Sequence[Record], suffixes: Sequence[str] | None = None) -> Batch:
        """Turn questions into model inputs without `labels`; each may have a suffix appended to its text."""

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Batch:
        """Put two training batches together as one."""

    def padded(self, batch: Mapping[str, Tensor]) -> Batch:
        """Fill texts up to all places of their tower, none of which is masked; UserError where nothing may be."""

    def example(self) -> Batch:
        """Make a small training batch that reaches every target layer which does not need a picture."""

    def length(self, record: Record) -> int:
        """Say how long a question is: batches are made of questions of about the same length."""

    def extent(self, record: Record) -> tuple[int, int]:
        """Count the tokens of a training record, those of pictures included, and those that carry loss."""

    def token_kinds(self, model: Any, batch: Mapping[str, Tensor], pictures: bool = False) -> dict[str, Tensor]:
        """Mark what counts in a batch by its kind: masks of one shape (b, t) or (b,), no place in two of them.

        With `pictures`, in the tower of layers that `sees_pictures` tells of.
        """

    def passing(self, model: Any, gradients: bool = False) -> AbstractContextManager:
        """Prepare a model for a data pass.

        Without `gradients` the head is skipped. With them the graph starts at the inputs, as no weight needs any.
        """

    def supervised(self, model: Any, batch: Mapping[str, Tensor]) -> AbstractContextManager:
        """Let a model give logits (1, n, classes) of what carries loss alone, in the order of the batch's labels."""

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of everything that carries one, and whose it is.

        Args:
            logits: as under `supervised`.
            labels: of the batch.

        Returns:
            (n,) float32, and the row of the batch that each belongs to, (n,).
        """

    def asking(self, ensemble: bool) -> AbstractContextManager:
        """Prepare for the questions of one set, of a model that does not change meanwhile.

        With `ensemble` classes are told by all of their texts, else by the first.
        """

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], limit: int, keep_rows: Callable[[Tensor], None]
    ) -> list[Answer]:
        """Answer a batch of questions by what is likeliest, in at most `limit` tokens.

        `keep_rows` is called with the places (n,) of unfinished rows, just before the batch shrinks to them.
        """

    def question_features(self, model: Any, batch: Mapping[str, Tensor], pictures: bool = True) -> Tensor:
        """Give what frozen parts see in questions, (b, d) float32, of which gates and routers decide."""

    def question_states(self, model: Any, batch: Mapping[str, Tensor], pictures: bool = True) -> Tensor:
        """Give what the model, as it stands, makes of questions behind its last block, (b, d) float32."""

    def picture_features(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Give what a dual encoder makes of the pictures of a training batch, (b, d); other families have none."""

    def feature_sizes(self, model: Any, pictures: bool = True) -> tuple[int, int]:
        """Say how many of `question_features` are of words, and how many of pictures."""

    def rows_by_question(self, model: Any, batch: Mapping[str, Tensor], rows: int) -> Tensor:
        """Say how many of a projector's input rows belong to each question, (b,)."""

    def sizes(self, model: Any, parts: Parts, dtype: torch.dtype) -> Sizes:
        """Count what a base takes, from its skeleton, which must not be used afterwards."""


def inputs_of(batch: Mapping[str, Tensor]) -> Batch:
    """Leave out what losses are made of: what remains goes into the model."""
    return {key: value for key, value in batch.items() if key not in OF_LOSSES}


def mean_by_row(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Give the mean of values (n,) by the row that each belongs to: (count,)."""
    return values.new_zeros(count).index_add(0, rows, values) / rows.bincount(minlength=count)
