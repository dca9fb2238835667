"""A tokenizer or processor that nobody can use is told in a sentence, before a picture is shown to it."""

from __future__ import annotations

import json

import pytest

from mllm_keeplora.checks.records import load_family
from mllm_keeplora.checks.run import check_run
from mllm_keeplora.config import BaseConfig, parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.asking import ask
from tests.support.tiny import tiny_config
from tests.support.tiny_dual import class_benchmark, write_class_data, write_tiny_clip


@pytest.fixture
def broken(tmp_path):
    """Function (file, keys) -> a CLIP's folder with other values in a JSON file of its."""

    def write(file, **values):
        folder = write_tiny_clip(tmp_path / "clip")
        told = json.loads((folder / file).read_text())
        told.get("image_processor", told).update(values)
        (folder / file).write_text(json.dumps(told))
        return folder

    return write


@pytest.mark.parametrize(
    "values",
    [{"model_max_length": "16"}, {"pad_token": None}, {"model_max_length": [16]}],
)
def test_a_tokenizer_that_makes_no_tokens_is_refused(values, broken):
    folder = broken("tokenizer_config.json", **values)
    with pytest.raises(UserError, match=r"the base's tokenizer cannot be used: |its processor cannot be loaded: "):
        load_family(BaseConfig(model=str(folder)), str(folder))


@pytest.mark.parametrize("values", [{"image_mean": "x"}, {"image_std": [1, 2]}])
def test_a_processor_that_prepares_no_picture_is_refused(values, broken):
    folder = broken("processor_config.json", **values)
    family = load_family(BaseConfig(model=str(folder)), str(folder))
    with pytest.raises(UserError, match="the base's processor cannot prepare pictures: "):
        family.example()


def test_a_check_tells_of_such_a_processor(broken, tmp_path):
    folder = broken("processor_config.json", image_std=[1, 2])
    root = write_class_data(tmp_path / "data", domains=("Alpha", "Beta"))
    values = tiny_config(folder, root, tmp_path / "out")
    values |= {"benchmark": class_benchmark(root, ("Alpha", "Beta")), "domains": ["Alpha", "Beta"]}
    with pytest.raises(UserError, match="the base's processor cannot prepare pictures: "):
        check_run(parse_config(values, "test"))


def test_classes_to_choose_from_are_whole_characters(tmp_path):
    with pytest.raises(UserError, match="--classes must be text in UTF-8, got half a character"):
        ask(write_tiny_clip(tmp_path / "clip"), None, [tmp_path / "a.png"], classes=["cat", "d\udcffg"])
