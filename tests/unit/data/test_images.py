"""Pictures as the processor gets them, against ones written out by hand."""

import copy

import numpy as np
import pytest
from PIL import Image

from mllm_keeplora.data.media.images import image_size, images_of, padded_to_square
from mllm_keeplora.data.schema import Media, Record, Turn
from mllm_keeplora.models import ChatPrompt

RED, GREEN, BLUE, MEAN = (250, 0, 0), (0, 250, 0), (0, 0, 250), (122, 116, 104)


def picture(rows):
    return Image.fromarray(np.array(rows, dtype=np.uint8))


def test_a_wide_picture_lies_in_the_middle_of_a_square_of_its_width():
    wide = picture([[RED, GREEN, BLUE]])
    assert np.array(padded_to_square(wide, MEAN)).tolist() == [
        [[122, 116, 104]] * 3,
        [[250, 0, 0], [0, 250, 0], [0, 0, 250]],
        [[122, 116, 104]] * 3,
    ]


def test_where_the_middle_falls_between_pixels_the_first_one_is_taken():
    tall = picture([[RED], [GREEN], [BLUE], [RED]])  # 1 x 4 in a square of 4: one column before it, two behind
    assert np.array(padded_to_square(tall, MEAN))[:, :, 0].tolist() == [
        [122, 250, 122, 122],
        [122, 0, 122, 122],
        [122, 0, 122, 122],
        [122, 250, 122, 122],
    ]


def test_a_square_picture_stays_as_it_is():
    square = picture([[RED, GREEN], [BLUE, RED]])
    assert padded_to_square(square, MEAN) is square


def test_the_background_is_the_processors_mean_rounded_down_as_llava_does(new_base):
    prompt = new_base().prompt
    processor = copy.deepcopy(prompt.processor)
    processor.image_processor.image_mean = [0.48145466, 0.4578275, 0.40821073]  # of CLIP
    assert ChatPrompt(processor).background == MEAN


@pytest.mark.parametrize(("pad", "size"), [(False, (3, 1)), (True, (3, 3))])
def test_a_record_says_whether_its_pictures_are_padded(tmp_path, pad, size):
    picture([[RED, GREEN, BLUE]]).save(tmp_path / "a.png")
    media = Media("image", tmp_path / "a.png", tmp_path, pad=pad)
    [shown] = images_of(Record("r", (media,), (Turn("user", "?"),)), MEAN)
    assert shown.size == image_size(media) == size
    if pad:
        assert shown.getpixel((0, 0)) == MEAN and shown.getpixel((0, 1)) == RED
