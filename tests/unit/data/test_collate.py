"""Two batches put together are what one batch of all their records would have been."""

import pytest
import torch

from mllm_keeplora.data.collate import joined


def test_joined_batches_are_the_batch_of_all_records(base, tiny_records):
    collate, records = base.family.training_batch, tiny_records["Alpha"]
    short, long = [records[0], records[2]], [records[1], records[3]]  # one question each, then two
    for first, second in ((short, long), (long, short)):
        found = joined(collate(first), collate(second), base.prompt.tokenizer.pad_token_id)
        wanted = collate([*first, *second])
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_smaller_pictures_are_filled_up_and_other_inputs_refused(base, tiny_records):
    batch = base.family.training_batch(tiny_records["Alpha"][:2])
    small = {**batch, "pixel_values": batch["pixel_values"][..., :-1]}
    found = joined(batch, small, 0)["pixel_values"]
    assert torch.equal(found[:2], batch["pixel_values"]) and torch.equal(found[2:, ..., :-1], small["pixel_values"])
    assert not found[2:, ..., -1].any()
    with pytest.raises(ValueError, match="pixel_values of shapes"):
        joined(batch, {**batch, "pixel_values": batch["pixel_values"][0]}, 0)


def test_what_only_one_batch_tells_of_each_token_is_zero_in_the_other():
    """As of the kinds of tokens, where only a batch with pictures has some; pictures themselves are not per token."""
    plain = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.ones(2, 3, dtype=torch.int64)}
    seeing = {
        "input_ids": torch.full((1, 5), 7), "labels": torch.full((1, 5), 7),
        "kinds": torch.ones(1, 5, dtype=torch.int64), "pixel_values": torch.ones(1, 3, 4, 4),
    }  # fmt: skip
    for first, second, rows in ((plain, seeing, [0, 0, 1]), (seeing, plain, [1, 0, 0])):
        whole = joined(first, second, pad=0)
        assert whole["kinds"].tolist() == [[row] * 5 for row in rows]
        assert whole["pixel_values"].shape == (1, 3, 4, 4) and whole["input_ids"].shape == (3, 5)
