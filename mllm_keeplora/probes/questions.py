"""What each question gives a target layer, as one vector: the mean of its rows that no answer reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models import IGNORED
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.models.running import removed_afterwards
from mllm_keeplora.probes.passes import looking
from mllm_keeplora.probes.rows import as_rows

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.models.family import Family


def question_means(
    family: Family, model: Any, layers: Sequence[str], projectors: Sequence[str], batch: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Average what target layers receive of each question of a training batch, in one pass without gradients.

    Tokens from the first answer on do not count, nor padding, nor the first token of a text, which has seen nothing but
    itself. In the text tower of a dual encoder a class text is in the place of a question.

    Args:
        family, model: of the base, not its peft form.
        layers, projectors: exact names of the target layers, and of the modules between the towers.
        batch: model inputs with labels.

    Returns:
        Target layer -> means (n, d_in) of questions, and (n,) whether the layer sees the question and it carries loss.
        Layers that the batch does not reach are left out.
    """
    labels, carries, found = batch["labels"], carrying(batch["labels"]), {}
    asked = cache(partial(_asked, family, model, batch))
    behind_towers = tuple(f"{name}." for name in projectors)

    def look(layer: str, module: Any, args: tuple) -> None:
        features, pictures = args[0].detach(), family.sees_pictures(layer)
        if layer.startswith(behind_towers):
            rows = as_rows(features)
            sizes = family.rows_by_question(model, batch, len(rows)).to(rows.device)
            means = _by_owner(rows, sizes)
            seen = sizes > 0
        else:
            means = _over_tokens(features, asked(pictures))
            seen = carries.new_ones(len(means))
        are_texts = labels.ndim == 1 and not pictures
        found[layer] = means, seen & (carries.any() if are_texts else carries)

    hooks = [model.get_submodule(layer).register_forward_pre_hook(partial(look, layer)) for layer in layers]
    with removed_afterwards(hooks), looking(family, model):
        model(**inputs_of(batch))
    return found


def carrying(labels: Tensor) -> Tensor:
    """Mark the questions of a batch that carry loss, (b,)."""
    return (labels != IGNORED).reshape(len(labels), -1).any(dim=1)


def _asked(family: Family, model: Any, batch: Mapping[str, Tensor], pictures: bool) -> Tensor:
    """Mark the tokens that count, (b, t)."""
    kinds = family.token_kinds(model, batch, pictures)
    counted = reduce(or_, kinds.values())
    if "instruction" in kinds:  # else pictures alone
        counted = counted & (counted.cumsum(dim=1) != 1)
    if "answer" in kinds:
        counted = counted & (kinds["answer"].cumsum(dim=1) == 0)
    return counted


def _over_tokens(features: Tensor, counted: Tensor) -> Tensor:
    """Average rows that lie one question behind the other; where no mask fits, they are of pictures and all count."""
    rows = features.reshape(len(counted), -1, features.shape[-1])
    if rows.shape[1] != counted.shape[1]:
        return rows.float().mean(dim=1)
    shares = counted / counted.sum(dim=1, keepdim=True).clamp(min=1)
    return (shares.to(rows.dtype).unsqueeze(1) @ rows).squeeze(1).float()


def _by_owner(rows: Tensor, sizes: Tensor) -> Tensor:
    """Average rows (n, d) by the question that each belongs to; zero for questions without any."""
    import torch

    owner = torch.arange(len(sizes), device=rows.device).repeat_interleave(sizes)
    sums = rows.new_zeros(len(sizes), rows.shape[1], dtype=torch.float32).index_add_(0, owner, rows.float())
    return sums / sizes.clamp(min=1).unsqueeze(1)
