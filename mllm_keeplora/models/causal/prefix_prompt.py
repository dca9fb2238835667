"""PaliGemma's prompt: pictures and question are a prefix that attends to itself both ways, the answer is causal.

Its processor adds a start mark and a line break to any text, so a conversation is put together here from its parts.
"""

from __future__ import annotations

from collections.abc import Sequence

from mllm_keeplora.data.schema import Record
from mllm_keeplora.models.causal.prompt import IGNORED, ChatPrompt


class PrefixPrompt(ChatPrompt):
    """Encode records for a base whose `token_type_ids` tell prefix (0) from answer (1).

    Without them an answer's token would see the ones that follow it while it is learnt.
    """

    def training_batch(self, records: Sequence[Record], images: Sequence[list], max_length: int | None) -> dict:
        """Make the batch of `ChatPrompt`; everything from the first trained token on is causal."""
        batch = super().training_batch(records, images, max_length)
        batch["token_type_ids"] = (batch["labels"] != IGNORED).int().cummax(dim=1).values.to(batch["input_ids"].dtype)
        return batch

    def _adds_marks(self, text: str) -> bool:
        return False

    def _process(self, texts: list[str], images: Sequence[list], side: str) -> dict:
        processor, mark = self.processor, self.processor.image_token
        widened = [text.replace(mark, mark * processor.image_seq_length) for text in texts]
        batch = dict(
            self.tokenizer(widened, padding=True, padding_side=side, add_special_tokens=False, return_tensors="pt")
        )
        batch["token_type_ids"] = batch["input_ids"].new_zeros(batch["input_ids"].shape)
        pictures = [picture for each in images for picture in each]
        if pictures:
            batch["pixel_values"] = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return batch
