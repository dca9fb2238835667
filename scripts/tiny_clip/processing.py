"""Tokenizer and processor of `tiny-clip`: known words are one token each, others are spelled in characters."""

from __future__ import annotations

import string
from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_clip import CLIPImageProcessor

SIZE, POSITIONS = 48, 16
MEAN, STD = [0.5, 0.5, 0.5], [0.3, 0.3, 0.3]
PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<start>", "<end>"
CHARACTERS = string.ascii_lowercase + string.digits + ".,:;!?'\"-&()/#*+"
# The end mark is number 3: models that pool at mark 2 take the largest number of a text for its end instead.
SPECIAL = (PAD, UNK, BOS, EOS)

_NORMALIZER = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
_SPLITTER = pre_tokenizers.Whitespace()


def split(text: str) -> list[str]:
    """Split a text into words and marks, as the tokenizer does before it looks them up."""
    return [piece for piece, _ in _SPLITTER.pre_tokenize_str(_NORMALIZER.normalize_str(text))]


def vocabulary(words: Iterable[str]) -> list[str]:
    """List all tokens: special ones, characters at the start of a word and within it, then whole words."""
    pieces = [*CHARACTERS, *(f"##{character}" for character in CHARACTERS)]
    return [*SPECIAL, *pieces, *sorted(set(words) - set(pieces))]


def build_tokenizer(tokens: list[str]) -> PreTrainedTokenizerFast:
    """Make the tokenizer that ships: start mark, words, end mark; at most 16 tokens."""
    core = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    core.normalizer, core.pre_tokenizer = _NORMALIZER, _SPLITTER
    marks = [(mark, tokens.index(mark)) for mark in (BOS, EOS)]
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=POSITIONS,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_processor(tokens: list[str]) -> CLIPProcessor:
    """Make the processor that ships: shorter side to 48, the middle 48 x 48, mean and deviation."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        resample=3,
        image_mean=MEAN,
        image_std=STD,
    )
    return CLIPProcessor(images, build_tokenizer(tokens))
