"""Two batches put together are what one batch of all their records would have been."""

import pytest
import torch

from mllm_keeplora.data.collate import TrainCollator, joined


def test_joined_batches_are_the_batch_of_all_records(base, tiny_records):
    collate, records = TrainCollator(base.prompt), tiny_records["Alpha"]
    short, long = [records[0], records[2]], [records[1], records[3]]  # one question each, then two
    for first, second in ((short, long), (long, short)):
        found = joined(collate(first), collate(second), base.prompt.tokenizer.pad_token_id)
        wanted = collate([*first, *second])
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_smaller_pictures_are_filled_up_and_other_inputs_refused(base, tiny_records):
    batch = TrainCollator(base.prompt)(tiny_records["Alpha"][:2])
    small = {**batch, "pixel_values": batch["pixel_values"][..., :-1]}
    found = joined(batch, small, 0)["pixel_values"]
    assert torch.equal(found[:2], batch["pixel_values"]) and torch.equal(found[2:, ..., :-1], small["pixel_values"])
    assert not found[2:, ..., -1].any()
    with pytest.raises(ValueError, match="pixel_values of shapes"):
        joined(batch, {**batch, "pixel_values": batch["pixel_values"][0]}, 0)
