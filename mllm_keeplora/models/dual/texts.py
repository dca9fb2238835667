"""Texts of classes to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mllm_keeplora.errors import UserError, shortened
from mllm_keeplora.models.reading import said

if TYPE_CHECKING:
    from torch import Tensor

CAUSAL = ("clip", "metaclip_2")  # kinds of bases whose text tower sees what came before alone


@dataclass(frozen=True)
class ClassTexts:
    """Make tokens of the classes' texts.

    Attributes:
        tokenizer: of the base.
        positions: most tokens that its text tower has places for.
        full: texts are padded to all positions, without a mask: SigLIP's tower attends to its padding. Of others
            those behind the longest text are left out, which changes nothing that is read.
        causal: no token attends to those behind it, so that padding without a mask changes no token of a text.
    """

    tokenizer: Any
    positions: int
    full: bool
    causal: bool = True

    @classmethod
    def of(cls, tokenizer: Any, config: Any) -> ClassTexts:
        """Take from a base's config what its text tower wants.

        Raises:
            UserError: the tokenizer makes no tokens of texts.
        """
        full = config.model_type.startswith("siglip") or "attention_mask" not in tokenizer.model_input_names
        try:
            positions = min(config.text_config.max_position_embeddings, tokenizer.model_max_length)
            tokenizer(["a", "a b"], padding="longest", return_tensors="pt")
        except Exception as error:  # of whatever kind: its files may hold anything
            raise UserError(f"the base's tokenizer cannot be used: {said(error)}") from error
        return cls(tokenizer, positions, full, config.model_type in CAUSAL)

    @property
    def pad(self) -> int:
        """The token that short texts are filled up with."""
        return self.tokenizer.pad_token_id or 0

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Give `input_ids` (C, L), and `attention_mask` unless the tower attends to its padding.

        Raises:
            UserError: a text is longer than the tower has places for: tokenizers would cut it without a word.
        """
        return dict(_tokens(self, tuple(texts)))

    def length(self, text: str) -> int:
        """Count the tokens of a text, marks included."""
        return len(self.tokenizer(text)["input_ids"])

    def padded(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fill texts up to all positions with token 0, none of it masked, as OpenAI's CLIP is given them."""
        from torch.nn.functional import pad

        ids, mask = batch["input_ids"], batch.get("attention_mask")
        whole = pad(ids if mask is None else ids * mask, (0, self.positions - ids.shape[1]))
        return {"input_ids": whole, "attention_mask": whole.new_ones(whole.shape)}


@lru_cache(64)  # all micro-batches of a domain show the same classes
def _tokens(texts: ClassTexts, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    found = texts.tokenizer(list(wanted), padding="longest", return_tensors="pt")
    ids = found["input_ids"]
    if ids.shape[1] > texts.positions:
        longest = max(wanted, key=texts.length)
        raise UserError(
            f"the text of a class, {shortened(repr(longest))}, is {texts.length(longest)} tokens long; the base's text "
            f"tower has places for {texts.positions}"
        )
    if texts.full:
        from torch.nn.functional import pad

        return {"input_ids": pad(ids, (0, texts.positions - ids.shape[1]), value=texts.pad)}
    return {"input_ids": ids, "attention_mask": found["attention_mask"]}
