"""Greedy answers to a batch of questions, where a row whose answer has ended takes no part in further steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.partition import keeps_step

if TYPE_CHECKING:
    from torch import Tensor

ENDED_SHARE = 0.25  # of the rows; taking them out copies the cache once, as a decoding step does anyway
KEPT_BY_ROW = frozenset({"full_attention", "sliding_attention", "chunked_attention"})  # layers whose cache has rows
ROUNDING = 2**-20  # of a logit in float32, relative: eight steps; half precision adds up in float32 and differs by one


@dataclass(frozen=True)
class Decoded:
    """Answers to a batch: `tokens` (b, n), and `close` (b,) whether a likeliest token led by no more than rounding.

    Rounding depends on the other rows of a batch, and so may such an answer.
    """

    tokens: Tensor
    close: Tensor


def greedy(
    model: Any,
    batch: Mapping[str, Tensor],
    max_new_tokens: int,
    ends: Iterable[int],
    pad: int,
    keep_rows: Callable[[Tensor], None] = lambda kept: None,
) -> Decoded:
    """Find the most likely tokens after left-padded questions.

    `generate` decodes every row until the longest answer is done. Here it is left once a quarter of the rows have
    ended and entered again with the cache of the others.

    Args:
        model: what answers; a model of transformers or its peft form.
        batch: `input_ids` and `attention_mask` (b, t), with whatever else the processor made.
        max_new_tokens: of one answer, end mark included.
        ends, pad: ids that end an answer, and the one behind an end.
        keep_rows: called with the places (n,) of unfinished rows, just before the batch shrinks to them.

    Returns:
        New tokens, n at most `max_new_tokens`; the end mark is among them where an answer has ended.
    """
    import torch
    from transformers import GenerationConfig

    # Rows leave where the model lets them, and never where processes must take the same steps.
    marks = torch.tensor(sorted(ends), device=batch["input_ids"].device)
    in_step = keeps_step(model)
    share = ENDED_SHARE if _rows_may_leave(model, batch) and not in_step else 1.0
    found = batch["input_ids"].new_full((len(batch["input_ids"]), max_new_tokens), pad)
    close = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    rows, done, inputs = torch.arange(len(found), device=found.device), 0, dict(batch)
    while True:
        # Answer until a share of the rows has ended.
        watched = _Watched(len(rows), marks, share, _rounding(model))
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens - done,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=marks.tolist(),
            pad_token_id=pad,
            return_dict_in_generate=True,
        )
        with _asked_for(model, settings):
            result = model.generate(
                **inputs,
                generation_config=settings,
                logits_processor=[watched.compare],
                stopping_criteria=[watched.may_leave],
                synced_gpus=in_step,
            )
        # Put down what is new, and go on with the rows that have not ended.
        new = result.sequences[:, inputs["input_ids"].shape[1] :]
        found[rows, done : done + new.shape[1]] = new
        done += new.shape[1]
        close[rows] |= watched.close
        going = torch.isin(new, marks).any(dim=1).logical_not()
        if done == max_new_tokens or not bool(going.any()):
            return Decoded(found[:, :done], close)
        rows, inputs = rows[going], _continued(model, inputs, result, going, keep_rows)


@contextmanager
def _asked_for(model: Any, settings: Any) -> Iterator[None]:
    """Keep what a base's files ask for (penalties, no cache) out of its answers: `generate` fills in from them."""
    having = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [module.generation_config for module in having]
    for module in having:
        module.generation_config = settings
    try:
        yield
    finally:
        for module, own in zip(having, before, strict=True):
            module.generation_config = own


class _Watched:
    """Looks on while `generate` answers: stops all rows once a share has ended, notes where two tokens were close."""

    def __init__(self, rows: int, marks: Tensor, share: float, rounding: float):
        import torch

        self.marks, self.share, self.rounding = marks, share, rounding
        self.ended = torch.zeros(rows, dtype=torch.bool, device=marks.device)
        self.close = self.ended.clone()

    def compare(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        first, second = scores.topk(2, dim=-1).values.unbind(-1)
        self.close |= (first - second <= self.rounding * first.abs()) & ~self.ended
        return scores

    def may_leave(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        import torch

        self.ended |= torch.isin(input_ids[:, -1], self.marks)
        stop = self.ended.float().mean() >= self.share
        return stop.expand(len(input_ids))


def _continued(
    model: Any, inputs: Mapping[str, Tensor], result: Any, going: Tensor, keep_rows: Callable[[Tensor], None]
) -> dict[str, Any]:
    """Inputs of the rows that go on: their tokens so far and what is cached of them, pictures included."""
    import torch

    name = "cache" if "cache" in result else "past_key_values"  # as transformers called it until 5.24
    kept = going.nonzero().flatten()
    result[name].batch_select_indices(kept)
    for module in model.modules():
        if hasattr(getattr(module, "rope_deltas", None), "shape"):  # what pictures add to positions, by row (Qwen-VL)
            module.rope_deltas = module.rope_deltas[kept]
    keep_rows(kept)
    new = result.sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"][kept], (0, new), value=1)
    return {"input_ids": result.sequences[kept], "attention_mask": mask, name: result[name]}


def _rounding(model: Any) -> float:
    """Relative size of the differences that other rows of a batch make to a logit."""
    import torch

    return max(torch.finfo(model.dtype).eps, ROUNDING)


def _rows_may_leave(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether every layer caches rows that can be picked."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or KEPT_BY_ROW
    return KEPT_BY_ROW.issuperset(kinds) and "cross_attention_mask" not in batch
