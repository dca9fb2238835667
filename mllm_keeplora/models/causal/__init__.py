"""Bases that write their answers token by token: LLaVA and all that `AutoModelForImageTextToText` loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mllm_keeplora.data.collate import joined
from mllm_keeplora.data.media.images import shown_of
from mllm_keeplora.data.schema import Record, Turn
from mllm_keeplora.errors import UserError
from mllm_keeplora.models.causal.decoding import greedy
from mllm_keeplora.models.causal.features import feature_sizes, final_states, prompt_features, rows_by_question
from mllm_keeplora.models.causal.losses import media_tokens, passing, supervised_logits, token_kinds, token_losses
from mllm_keeplora.models.causal.parts import name_parts, projector_names, summary_of
from mllm_keeplora.models.causal.prompt import ChatPrompt, extent_of, prompt_of
from mllm_keeplora.models.causal.sizes import sizes_of
from mllm_keeplora.models.family import Answer, Batch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CausalFamily:
    """`models.family.Family` of such a base, which its prompt makes batches for."""

    prompt: ChatPrompt

    auto: ClassVar[str] = "AutoModelForImageTextToText"
    name_parts = staticmethod(name_parts)
    summary = staticmethod(summary_of)
    projector_names = staticmethod(projector_names)
    passing = staticmethod(passing)
    supervised = staticmethod(supervised_logits)
    losses = staticmethod(token_losses)
    question_features = staticmethod(prompt_features)
    question_states = staticmethod(final_states)
    feature_sizes = staticmethod(feature_sizes)
    rows_by_question = staticmethod(rows_by_question)
    sizes = staticmethod(sizes_of)

    @property
    def processor(self) -> Any:
        return self.prompt.processor

    @classmethod
    def of(cls, processor: Any, config: Any, style: str, generation: Any, video: str = "auto") -> CausalFamily:
        return cls(prompt_of(processor, style, generation, video))

    @staticmethod
    def vocabulary(model: Any) -> int | None:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)

    @staticmethod
    def sees_pictures(layer: str) -> bool:
        return False  # of the tower no layer learns, and a projector's rows are told apart by their shape

    def training_batch(self, records: Sequence[Record], max_length: int | None = None) -> Batch:
        records = list(map(self.prompt.shown, records))
        return self.prompt.training_batch(records, self._shown(records), max_length)

    def question_batch(self, records: Sequence[Record], suffixes: Sequence[str] | None = None) -> Batch:
        records = list(map(self.prompt.shown, records))
        return self.prompt.question_batch(records, self._shown(records), suffixes)

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Batch:
        return joined(first, second, self.prompt.tokenizer.pad_token_id)

    def padded(self, batch: Mapping[str, Tensor]) -> Batch:
        raise UserError("strategy.feature_padding is for dual encoders: no text of this base has places to fill up to")

    def example(self) -> Batch:
        return self.training_batch([Record("a text", (), (Turn("user", "?"), Turn("assistant", "!")))])

    def length(self, record: Record) -> int:
        return self.prompt.length(self.prompt.shown(record))

    def extent(self, record: Record) -> tuple[int, int]:
        record = self.prompt.shown(record)
        sizes = list(map(extent_of, *self._shown([record])))
        return self.prompt.total_tokens(record, sizes), self.prompt.trained_tokens(record)

    def asking(self, ensemble: bool) -> AbstractContextManager:
        return nullcontext()

    def token_kinds(self, model: Any, batch: Mapping[str, Tensor], pictures: bool = False) -> dict[str, Tensor]:
        return token_kinds(batch, media_tokens(model.config))

    def answers(
        self, model: Any, batch: Mapping[str, Tensor], limit: int, keep_rows: Callable[[Tensor], None]
    ) -> list[Answer]:
        import torch

        prompt = self.prompt
        found = greedy(model, batch, limit, prompt.ends, prompt.tokenizer.pad_token_id, keep_rows)
        ends = torch.tensor(sorted(prompt.ends), device=found.tokens.device)
        ended = torch.isin(found.tokens, ends).any(dim=1).tolist()
        told = zip(prompt.answers(found.tokens), ended, found.close.tolist(), strict=True)
        return [Answer(text, not has_ended, is_close) for text, has_ended, is_close in told]

    def _shown(self, records: Sequence[Record]) -> list[list]:
        return [shown_of(record, self.prompt.background) for record in records]
