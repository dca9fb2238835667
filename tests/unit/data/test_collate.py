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


def test_pictures_of_two_shapes_are_named_and_refused(base, tiny_records):
    batch = TrainCollator(base.prompt)(tiny_records["Alpha"][:2])
    other = {**batch, "pixel_values": batch["pixel_values"][..., :-1]}
    with pytest.raises(ValueError, match="pixel_values of shapes"):
        joined(batch, other, 0)
