"""What the frozen parts of a base see in a question: the same in training, for the first token and for the last.

Gates and routers look at this alone. Nothing that is trained touches it (embeddings and vision tower are frozen), nor
does an answer, so that what was learnt to be silent on a question stays so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mllm_keeplora.errors import UserError
from mllm_keeplora.models.causal.losses import IGNORED
from mllm_keeplora.models.causal.parts import projectors_of
from mllm_keeplora.models.running import removed_afterwards

TEXT = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids", "position_ids")


def prompt_features(batch: Mapping[str, Tensor], model: Any, pictures: bool = True) -> Tensor:
    """Mean embedding of a question's words, beside the mean of what the vision tower gives for its pictures.

    Args:
        batch: model inputs (b, t), padded on either side; with `labels`, words from the first answer on do not count.
        model: the base model.
        pictures: False leaves the pictures out.

    Returns:
        (b, d) float32, d as `feature_sizes` has it: zeros for the pictures of a question without any, and behind those
        of a tower whose patches the projector joins.

    Raises:
        UserError: the base has no way to ask its tower alone, or its pictures cannot be told apart by question.
    """
    words = _mean_of_words(batch, model)
    if not pictures:
        return words
    seen = _mean_of_pictures(batch, model)
    return torch.cat([words, seen], dim=1)


def feature_sizes(model: Any, pictures: bool = True) -> tuple[int, int]:
    """How many of `prompt_features` are of words, and how many of pictures."""
    return model.get_input_embeddings().embedding_dim, _width(model) if pictures else 0


def words_of_questions(batch: Mapping[str, Tensor], image_token: int | None) -> Tensor:
    """(b, t) bool: tokens of the instruction, without padding, pictures, and everything from the first answer on."""
    tokens = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(tokens)).bool()
    if image_token is not None:
        mask &= tokens != image_token
    if "labels" in batch:
        mask &= (batch["labels"] != IGNORED).cumsum(dim=1) == 0
    return mask


def _mean_of_words(batch: Mapping[str, Tensor], model: Any) -> Tensor:
    token = getattr(model.config, "image_token_id", None)
    mask = words_of_questions(batch, token)
    ids = batch["input_ids"].masked_fill(~mask, 0)
    embedded = model.get_input_embeddings()(ids).detach().float()
    return (embedded * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


class _Seen(Exception):
    """Ends the pass at the projector."""


def _mean_of_pictures(batch: Mapping[str, Tensor], model: Any) -> Tensor:
    """Mean tower feature of each question's pictures, (b, width)."""
    count, width, given = len(batch["input_ids"]), _width(model), _of_pictures(batch)
    if "pixel_values" not in given:
        return torch.zeros(count, width, device=batch["input_ids"].device)
    rows = _tower_rows(given, model)
    sizes = rows_by_question(batch, model, len(rows)).to(rows.device)
    owner = torch.arange(count, device=rows.device).repeat_interleave(sizes)
    means = rows.new_zeros(count, rows.shape[1]).index_add_(0, owner, rows) / sizes.clamp(min=1).unsqueeze(1)
    return torch.nn.functional.pad(means, (0, width - means.shape[1]))


def rows_by_question(batch: Mapping[str, Tensor], model: Any, rows: int) -> Tensor:
    """How many of the rows that the projector is given for a batch belong to each question, (b,).

    As many as its image tokens have it; of pictures in tiles, whose number depends on a picture's shape, each question
    is asked alone.

    Raises:
        UserError: questions of several pictures in tiles, or rows that are not in proportion to the image tokens.
    """
    given, spans = _of_pictures(batch), (batch["input_ids"] == model.config.image_token_id).sum(dim=1)
    if not _in_tiles(given) and int(spans.sum()) and rows % int(spans.sum()) == 0:
        return spans * (rows // int(spans.sum()))
    if not all(len(value) == len(spans) for value in given.values()):
        raise UserError(
            f"{type(model).__name__}: {rows} picture features cannot be dealt out to {len(spans)} questions; "
            "strategy.pictures=false looks at the words alone, adapters.projector=frozen leaves out the projector"
        )
    alone = ({name: value[[row]] for name, value in given.items()} for row in range(len(spans)))
    return torch.tensor([len(_tower_rows(each, model)) for each in alone], device=spans.device)


def _in_tiles(given: Mapping[str, Tensor]) -> bool:
    """Whether a picture is cut into as many tiles as its shape asks for (LLaVA-NeXT, OneVision)."""
    return "image_sizes" in given and given["pixel_values"].ndim == 5


def _of_pictures(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in TEXT and value is not None}


def _tower_rows(given: Mapping[str, Any], model: Any) -> Tensor:
    """What the projector is given for some pictures, (n, width) float32."""
    if not hasattr(model, "get_image_features"):
        raise UserError(
            f"{type(model).__name__} cannot be asked for its pictures' features alone; strategy.pictures=false looks "
            "at the words alone"
        )
    caught: list[Tensor] = []

    def catch(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        caught.append(next(each for each in (*args, *kwargs.values()) if torch.is_tensor(each)))
        raise _Seen

    handle = projectors_of(model)[0].register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad(), removed_afterwards([handle]), contextlib.suppress(_Seen):
        model.get_image_features(**given)
    return caught[0].reshape(-1, caught[0].shape[-1]).float()


def _width(model: Any) -> int:
    """Size that the tower's features are filled up to: what the projector's first linear layer takes in."""
    linears = [each for each in projectors_of(model)[0].modules() if isinstance(each, torch.nn.Linear)]
    return linears[0].in_features if linears else model.config.vision_config.hidden_size
