"""A tokenizer or processor that nobody can use is told in a sentence, before a picture is shown to it."""

from __future__ import annotations

import json

import pytest

from mllm_keeplora.checks.records import load_family
from mllm_keeplora.checks.run import check_run
from mllm_keeplora.config import BaseConfig, parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.asking import ask
from mllm_keeplora.models import load_base
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


@pytest.mark.parametrize(
    ("values", "made"),
    [
        ({"crop_size": {"height": 48, "width": 40}}, "48 x 40"),
        ({"do_center_crop": False, "size": {"height": 16, "width": 16}}, "16 x 16"),
    ],
)
def test_a_processor_of_another_size_than_the_tower_is_refused_at_loading(values, made, broken):
    folder = broken("processor_config.json", **values)
    told = rf"^base {folder}: its processor makes pictures of {made} \(processor_config.json\), but its image tower "
    for load in (lambda: load_family(BaseConfig(model=str(folder)), str(folder)), lambda: loaded(folder)):
        with pytest.raises(UserError, match=told + r"takes 32 x 32 alone \(vision_config.image_size in config.json\)$"):
            load()


def loaded(folder):
    return load_base(BaseConfig(model=str(folder)), "frozen")


def test_the_older_file_of_a_processor_is_named_where_it_tells_the_size(broken):
    folder = broken("processor_config.json", crop_size={"height": 48, "width": 48})
    own = json.loads((folder / "processor_config.json").read_text()).pop("image_processor")
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    (folder / "processor_config.json").unlink()
    with pytest.raises(UserError, match=r"48 x 48 \(preprocessor_config.json\), but"):
        load_family(BaseConfig(model=str(folder)), str(folder))


@pytest.mark.parametrize("values", [{"do_center_crop": False}, {"crop_size": {"height": 32, "width": 32}}])
def test_sizes_that_fit_or_are_left_open_are_not_refused(values, broken):
    folder = broken("processor_config.json", **values)
    assert load_family(BaseConfig(model=str(folder)), str(folder)).patches == 17


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
