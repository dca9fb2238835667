"""A check finds everything that is wrong with a data set of classes at once."""

from __future__ import annotations

import json
import re

import pytest

from mllm_keeplora.checks.classes import class_faults, prompt_faults
from mllm_keeplora.checks.run import check_run
from mllm_keeplora.config import parse_config
from mllm_keeplora.data import load_benchmark
from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.errors import UserError
from tests.support.mtil_trees import TREES, write_mtil
from tests.support.tiny import tiny_config, write_tiny_llava

NAMES = ["Aircraft", "DTD", "EuroSAT", "MNIST"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_tiny_llava(tmp_path_factory.mktemp("base"))


def configured(base, root, benchmark, names, **changes):
    values = tiny_config(base, root, root / "out", data_root=str(root), **changes)
    return parse_config({**values, "benchmark": benchmark, "domains": names}, "test")


class Words:
    """Counts a token for each word, and marks of begin and end."""

    def __call__(self, texts):
        return {"input_ids": [[0, *range(1, 1 + len(text.split())), 0] for text in texts]}


def test_a_faultless_tree_of_mtil_passes(base, tmp_path):
    config = configured(base, tmp_path, write_mtil(tmp_path, NAMES), NAMES)
    checked = check_run(config)
    for name in NAMES:
        assert checked.counts[name] == {key: TREES[name][1][key] for key in ("train", "test")}
        assert len(checked.shown[name]["train"]) == TREES[name][1]["train"]
    assert [record.turns[0].text for record in checked.benchmark.test_records("DTD")] == ["Which class is shown?"] * 6


def test_a_check_finds_every_fault_of_a_tree_at_once(base, tmp_path):
    names = [*NAMES, "Caltech101"]
    benchmark = write_mtil(tmp_path, names)
    bonsai = tmp_path / "caltech101/101_ObjectCategories/bonsai"  # a missing class
    bonsai.rename(tmp_path / "elsewhere")
    labels = tmp_path / "dtd/dtd/labels/train1.txt"  # a wrong count, and a class without a training record
    labels.write_text("".join(line for line in labels.read_text().splitlines(True) if not line.startswith("dotted")))
    path = tmp_path / "twice.json"  # a name that stands twice
    folders = sorted(each.name for each in (tmp_path / "eurosat/2750").iterdir())
    path.write_text(json.dumps({"names": ["forest", *folders[1:9], "Forest"], "labels": folders}))
    benchmark["domains"]["EuroSAT"] |= {"classes": "twice.json", "prompts": ["a photo"]}
    (tmp_path / "fgvc-aircraft-2013b/data/images/0000003.jpg").write_bytes(b"no picture")  # an unreadable picture
    with pytest.raises(UserError) as told:
        check_run(configured(base, tmp_path, benchmark, names))
    expected = [
        "Caltech101, classes of .*: the published files lack class 'bonsai'",
        r"Caltech101: 480 train records, but the published set has 484",
        r"Caltech101: 120 test records, but the published set has 122",
        "Caltech101: no training record shows 'bonsai'",
        "DTD: 4 train records, but the published set has 6",
        "DTD: no training record shows 'dotted'",
        "EuroSAT, classes of .*twice.json: class names must differ, .*; there is 'forest' and 'Forest'",
        "EuroSAT, classes of .*: a prompt holds one {}, the place of the class name; got 'a photo'",
        r"fgvc-aircraft-2013b record 3: image .*0000003.jpg cannot be read",
    ]
    sentences = list(told.value.sentences)
    for each in expected:
        found = [sentence for sentence in sentences if re.search(each, sentence)]
        assert len(found) == 1, (each, sentences)
        sentences.remove(found[0])
    assert sentences == []


def test_a_missing_folder_is_told_once(base, tmp_path):
    benchmark = write_mtil(tmp_path, ["DTD", "MNIST"])
    (tmp_path / "dtd").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError) as told:
        check_run(configured(base, tmp_path, benchmark, ["DTD", "MNIST"]))
    assert len(told.value.sentences) == 1 and f"file {tmp_path}/dtd/dtd does not exist" in str(told.value)


def test_counts_are_those_of_the_whole_set_whatever_is_drawn_of_it(base, tmp_path):
    config = configured(base, tmp_path, write_mtil(tmp_path, ["DTD", "MNIST"]), ["DTD", "MNIST"], shots=1)
    checked = check_run(config)
    assert checked.counts["DTD"] == {"train": 3, "test": 6} and checked.counts["MNIST"]["train"] == 10


def test_a_class_without_a_training_record_is_a_fault_where_each_is_needed(tmp_path):
    for name, label in (("train", "cat"), ("test", "dog")):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"id": 1, "image": "a.png", "label": label}]))
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog"]))
    own = {"train": "train.json", "test": "test.json", "classes": "classes.json"}
    benchmark = {"name": "own", "domains": {"Pets": own}}
    loaded = load_benchmark(configured(tmp_path, tmp_path, benchmark, ["Pets"]))
    assert list(class_faults(loaded, "Pets")) == []
    assert list(class_faults(loaded, "Pets", every_class=True)) == ["Pets: no training record shows 'dog'"]


def test_a_prompt_that_a_text_tower_would_cut_is_named():
    classes = ClassList.of(["cat", "a very long name of a cat"], ["a photo of a {}.", "the {}"])
    assert list(prompt_faults(classes, Words(), 13)) == []
    assert list(prompt_faults(classes, Words(), 7)) == [
        "class 'a very long name of a cat': 'a photo of a a very long name of a cat.' has 13 tokens, "
        "the text tower has places for 7"
    ]
    assert len(list(prompt_faults(classes, Words(), 3))) == 2
