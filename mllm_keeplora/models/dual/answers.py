"""Zero-shot classification: which class's texts a picture is nearest to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.models.causal.decoding import ROUNDING
from mllm_keeplora.models.dual.losses import held_by
from mllm_keeplora.models.dual.texts import ClassTexts
from mllm_keeplora.models.family import Answer
from mllm_keeplora.models.partition import copy_of

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 256  # texts


def text_features(model: Any, texts: ClassTexts, classes: ClassList, ensemble: bool) -> Tensor:
    """Give what the text tower makes of each class, (C, d) of unit length.

    Args:
        model: what answers.
        texts: makes tokens.
        classes: C of them.
        ensemble: take the mean over all texts of a class, each of unit length; else its first text.
    """
    import torch
    from torch.nn.functional import normalize

    device = next(model.parameters()).device
    shown = [each if ensemble else each[:1] for each in classes.texts]
    flat = [text for each in shown for text in each]
    rows = []
    for start in range(0, len(flat), AT_ONCE):
        tokens = texts.tokens(flat[start : start + AT_ONCE])
        inputs = {name: values.to(device) for name, values in tokens.items()}
        rows.append(normalize(_projected(model.get_text_features(**inputs)).float(), dim=-1))
    owner = torch.arange(len(shown), device=device).repeat_interleave(
        torch.tensor(list(map(len, shown)), device=device)
    )
    return normalize(rows[0].new_zeros(len(shown), rows[0].shape[1]).index_add(0, owner, torch.cat(rows)), dim=-1)


def likeliest(
    model: Any, batch: Mapping[str, Tensor], lists: Sequence[ClassList], features: Mapping[int, Tensor], count: int
) -> Iterator[list[tuple[str, float, float]]]:
    """Rank the classes of every picture.

    Args:
        model: what answers.
        batch: pictures, and in `lists` (b,) the place of each one's class list.
        lists: class lists.
        features: place of a list -> (C, d) of unit length.
        count: most classes of a picture that are told.

    Yields:
        Name, probability, and logit over temperature (a cosine) of each, the likeliest first.
    """
    from torch.nn.functional import normalize

    pictures = {name: values for name, values in batch.items() if name != "lists"}
    seen = normalize(picture_features(model, pictures).float(), dim=-1)
    scale, held = temperature(model), held_by(model)
    for row, place in zip(seen, batch["lists"].tolist(), strict=True):
        logits, names = scale * (features[place] @ row), lists[place].names
        if (prototypes := held.get(lists[place].digest)) is not None:
            logits = logits + prototypes(row[None])[0]
        best = logits.topk(min(count, len(names)))
        likely = logits.softmax(0)[best.indices].tolist()
        told = zip(best.indices.tolist(), likely, (best.values / scale).tolist(), strict=True)
        yield [(names[index], probability, cosine) for index, probability, cosine in told]


def picture_features(model: Any, pictures: Mapping[str, Tensor]) -> Tensor:
    """Give what the image tower makes of pictures, (b, d) behind its projection."""
    return _projected(model.get_image_features(**pictures))


def answer_of(ranked: Sequence[tuple[str, float, float]]) -> Answer:
    """Take the likeliest class as an answer."""
    (name, probability, cosine), *others = ranked
    if not others:
        return Answer(name, False, False, probability)
    return Answer(name, False, cosine - others[0][2] <= ROUNDING, probability, others[0][0])


def temperature(model: Any) -> float:
    """Give what cosines are multiplied by before the softmax."""
    if hasattr(model, "logit_scale"):
        return float(copy_of(model.logit_scale).exp())
    return 1.0 / float(copy_of(model.temperature))  # ALIGN's


def _projected(output: Any) -> Tensor:
    """What a tower gives behind its projection: a tensor, or with later transformers an output that holds it."""
    return getattr(output, "pooler_output", output)
