"""Greedy answers to a batch of questions, where a row whose answer has ended takes no part in further steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.partition import keeps_step

if TYPE_CHECKING:
    from torch import Tensor

ENDED_SHARE = 0.25  # of the rows; taking them out copies the cache once, as a decoding step does anyway
KEPT_BY_ROW = frozenset({"full_attention", "sliding_attention", "chunked_attention"})  # layers whose cache has rows


def greedy(model: Any, batch: Mapping[str, Tensor], max_new_tokens: int, ends: Iterable[int], pad: int) -> Tensor:
    """Most likely tokens after left-padded questions.

    `generate` decodes every row until the longest answer is done. Here it is left once a quarter of the rows have
    ended and entered again with the cache of the others.

    Args:
        model: what answers; a model of transformers or its peft form.
        batch: `input_ids` and `attention_mask` (b, t), with whatever else the processor made.
        max_new_tokens: of one answer, end mark included.
        ends: ids that end an answer.
        pad: id behind an end.

    Returns:
        (b, n) new tokens, n at most `max_new_tokens`; the end mark is among them where an answer has ended.
    """
    import torch

    marks = torch.tensor(sorted(ends), device=batch["input_ids"].device)
    in_step = keeps_step(model)
    share = ENDED_SHARE if _rows_may_leave(model, batch) and not in_step else 1.0
    found = batch["input_ids"].new_full((len(batch["input_ids"]), max_new_tokens), pad)
    rows, done, inputs = torch.arange(len(found), device=found.device), 0, dict(batch)
    while True:
        watched = _share_ended(marks, share)
        result = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens - done,
            do_sample=False,
            num_beams=1,
            eos_token_id=marks.tolist(),
            pad_token_id=pad,
            stopping_criteria=[watched],
            synced_gpus=in_step,
            return_dict_in_generate=True,
        )
        new = result.sequences[:, inputs["input_ids"].shape[1] :]
        found[rows, done : done + new.shape[1]] = new
        done += new.shape[1]
        going = torch.isin(new, marks).any(dim=1).logical_not()
        if done == max_new_tokens or not bool(going.any()):
            return found[:, :done]
        rows, inputs = rows[going], _continued(model, inputs, result, going)


def _share_ended(marks: Tensor, share: float) -> Any:
    """A criterion of `generate` that stops all rows once this share of them has ended."""
    import torch
    from transformers import StoppingCriteria

    class ShareEnded(StoppingCriteria):
        ended: Tensor | bool = False

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.ended = torch.isin(input_ids[:, -1], marks) | self.ended
            stop = self.ended.float().mean() >= share
            return stop.expand(len(input_ids))

    return ShareEnded()


def _continued(model: Any, inputs: Mapping[str, Tensor], result: Any, going: Tensor) -> dict[str, Any]:
    """Inputs of the rows that go on: their tokens so far and what is cached of them, pictures included."""
    import torch

    from mllm_keeplora.adapters.mixing import mixer_of

    name = "cache" if "cache" in result else "past_key_values"  # as transformers called it until 5.24
    kept = going.nonzero().flatten()
    result[name].batch_select_indices(kept)
    for module in model.modules():
        if hasattr(getattr(module, "rope_deltas", None), "shape"):  # what pictures add to positions, by row (Qwen-VL)
            module.rope_deltas = module.rope_deltas[kept]
    mixer = mixer_of(model)
    if mixer is not None:
        mixer.keep_rows(kept)
    new = result.sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"][kept], (0, new), value=1)
    return {"input_ids": result.sequences[kept], "attention_mask": mask, name: result[name]}


def _rows_may_leave(model: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether every layer caches rows that can be picked."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or KEPT_BY_ROW
    return KEPT_BY_ROW.issuperset(kinds) and "cross_attention_mask" not in batch
