"""What the frozen parts of a base see in a question: the same in training, for the first token and for the last.

Gates and routers look at this alone. Nothing that is trained touches it (embeddings and vision tower are frozen), nor
does an answer, so that what was learnt to be silent on a question stays so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mllm_keeplora.errors import UserError
from mllm_keeplora.models.causal.losses import IGNORED, is_any_of, media_tokens
from mllm_keeplora.models.causal.parts import projectors_of
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.models.running import removed_afterwards

if TYPE_CHECKING:
    from torch import Tensor

TEXT = ("input_ids", "attention_mask", "labels", "token_type_ids", "mm_token_type_ids", "position_ids")


def prompt_features(model: Any, batch: Mapping[str, Tensor], pictures: bool = True) -> Tensor:
    """Give the mean embedding of a question's words, beside the mean of what the vision tower gives for its pictures.

    Args:
        model: the base model.
        batch: model inputs (b, t), padded on either side; with `labels`, words from the first answer on do not count.
        pictures: False leaves the pictures out.

    Returns:
        (b, d) float32, d as `feature_sizes` has it: zeros for the pictures of a question without any, and behind those
        of a tower whose patches the projector joins.

    Raises:
        UserError: the base has no way to ask its tower alone, or its pictures cannot be told apart by question.
    """
    import torch

    mask = _asked(model, batch)
    embedded = model.get_input_embeddings()(batch["input_ids"].masked_fill(~mask, 0)).detach().float()
    words = _mean(embedded, mask)
    if not pictures:
        return words

    # pictures: each question's share of the rows that the tower gives for the whole batch
    width, given = feature_sizes(model)[1], _of_pictures(batch)
    if "pixel_values_videos" in given:
        raise UserError(
            f"{type(model).__name__}: what its tower sees of clips cannot be dealt out to questions; base.video=frames "
            "shows them as pictures, strategy.pictures=false looks at the words alone"
        )
    if "pixel_values" not in given:
        return torch.nn.functional.pad(words, (0, width))
    rows = _tower_rows(model, given)
    sizes = rows_by_question(model, batch, len(rows)).to(rows.device)
    owner = torch.arange(len(words), device=rows.device).repeat_interleave(sizes)
    means = rows.new_zeros(len(words), rows.shape[1]).index_add_(0, owner, rows) / sizes.clamp(min=1).unsqueeze(1)
    return torch.cat([words, torch.nn.functional.pad(means, (0, width - means.shape[1]))], dim=1)


def final_states(model: Any, batch: Mapping[str, Tensor], pictures: bool = True) -> Tensor:
    """Give the mean state of a question's tokens behind the last block, (b, d) float32, as the head receives it.

    The whole model runs, as it stands. Arguments are those of `prompt_features`; without `pictures` their tokens do not
    count, though words have seen them.
    """
    import torch

    caught: list[Tensor] = []

    def catch(module: Any, args: tuple) -> tuple:
        caught.append(args[0])
        return (args[0][:1, :0], *args[1:])  # no product with the vocabulary

    handle = model.get_output_embeddings().register_forward_pre_hook(catch)
    with torch.no_grad(), removed_afterwards([handle]):
        model(**inputs_of(batch), use_cache=False)
    return _mean(caught[0].float(), _asked(model, batch, pictures))


def feature_sizes(model: Any, pictures: bool = True) -> tuple[int, int]:
    """Say how many of `prompt_features` are of words, and how many of pictures.

    Those of pictures are as many as the projector's first linear layer takes in, to which shorter ones are filled up.
    """
    from torch.nn import Linear

    words = model.get_input_embeddings().embedding_dim
    if not pictures:
        return words, 0
    linears = [each for each in projectors_of(model)[0].modules() if isinstance(each, Linear)]
    return words, linears[0].in_features if linears else model.config.vision_config.hidden_size


def rows_by_question(model: Any, batch: Mapping[str, Tensor], rows: int) -> Tensor:
    """Say how many of the rows that the projector is given for a batch belong to each question, (b,).

    As many as its image tokens have it; of pictures in tiles, whose number depends on a picture's shape, each question
    is asked alone.

    Raises:
        UserError: questions of several pictures in tiles, or rows that are not in proportion to the image tokens.
    """
    import torch

    given, spans = _of_pictures(batch), (batch["input_ids"] == model.config.image_token_id).sum(dim=1)
    # LLaVA-NeXT and OneVision cut a picture into as many tiles as its shape asks for
    in_tiles = "image_sizes" in given and given["pixel_values"].ndim == 5
    if not in_tiles and int(spans.sum()) and rows % int(spans.sum()) == 0:
        return spans * (rows // int(spans.sum()))
    if not all(len(value) == len(spans) for value in given.values()):
        raise UserError(
            f"{type(model).__name__}: {rows} picture features cannot be dealt out to {len(spans)} questions; "
            "strategy.pictures=false looks at the words alone, adapters.projector=frozen leaves out the projector"
        )
    alone = ({name: value[[row]] for name, value in given.items()} for row in range(len(spans)))
    return torch.tensor([len(_tower_rows(model, each)) for each in alone], device=spans.device)


def _asked(model: Any, batch: Mapping[str, Tensor], pictures: bool = False) -> Tensor:
    """Tokens of the instruction (b, t), with `pictures` theirs: no padding, and nothing from the first answer on."""
    mask, media = batch["attention_mask"].bool(), media_tokens(model.config)
    if media and not pictures:
        mask = mask & ~is_any_of(batch["input_ids"], media)
    if "labels" in batch:
        mask = mask & ((batch["labels"] != IGNORED).cumsum(dim=1) == 0)
    return mask


def _mean(rows: Tensor, mask: Tensor) -> Tensor:
    return (rows * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def _of_pictures(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name not in TEXT and value is not None}


class _Seen(Exception):
    """Ends the pass at the projector."""


def _tower_rows(model: Any, given: Mapping[str, Any]) -> Tensor:
    """What the projector is given for some pictures, (n, width) float32."""
    import torch

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
