"""Bases that write their answers token by token: LLaVA and all that `AutoModelForImageTextToText` loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mllm_keeplora.data.collate import joined
from mllm_keeplora.data.media.images import images_of
from mllm_keeplora.data.schema import Record
from mllm_keeplora.models.causal.decoding import greedy
from mllm_keeplora.models.causal.logits import graph_from_inputs, supervised_logits, without_logits
from mllm_keeplora.models.causal.losses import supervised_positions, token_kinds, token_losses
from mllm_keeplora.models.causal.parts import Parts, name_parts
from mllm_keeplora.models.causal.prompt import ChatPrompt
from mllm_keeplora.models.family import Answer, Batch, Sizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class CausalFamily:
    """`models.family.Family` of such a base, which its prompt makes batches for."""

    prompt: ChatPrompt

    def name_parts(self, model: Any, projector: str, target: str | Sequence[str]) -> Parts:
        return name_parts(model, projector, target)

    def training_batch(self, records: Sequence[Record], max_length: int | None = None) -> Batch:
        return self.prompt.training_batch(records, self._images(records), max_length)

    def question_batch(self, records: Sequence[Record], suffixes: Sequence[str] | None = None) -> Batch:
        return self.prompt.question_batch(records, self._images(records), suffixes)

    def joined(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Batch:
        return joined(first, second, self.prompt.tokenizer.pad_token_id)

    def length(self, record: Record) -> int:
        return self.prompt.length(record)

    def token_kinds(self, model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return token_kinds(batch, getattr(model.config, "image_token_id", None))

    @contextmanager
    def passing(self, model: Any, gradients: bool = False) -> Iterator[None]:
        with graph_from_inputs(model) if gradients else without_logits(model):
            yield

    def supervised(self, model: Any, labels: Tensor) -> AbstractContextManager:
        return supervised_logits(model, labels)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return token_losses(logits, labels), supervised_positions(labels)[0]

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

    def question_features(self, model: Any, batch: Mapping[str, Tensor], pictures: bool = True) -> Tensor:
        from mllm_keeplora.models.causal.features import prompt_features

        return prompt_features(batch, model, pictures)

    def feature_sizes(self, model: Any, pictures: bool = True) -> tuple[int, int]:
        from mllm_keeplora.models.causal.features import feature_sizes

        return feature_sizes(model, pictures)

    def rows_by_question(self, model: Any, batch: Mapping[str, Tensor], rows: int) -> Tensor:
        from mllm_keeplora.models.causal.features import rows_by_question

        return rows_by_question(batch, model, rows)

    def sizes(self, model: Any, parts: Parts, dtype: torch.dtype) -> Sizes:
        from mllm_keeplora.models.causal.sizes import sizes_of

        return sizes_of(model, parts, dtype)

    def _images(self, records: Sequence[Record]) -> list[list]:
        return [images_of(record, self.prompt.background) for record in records]
