"""A picture and its class are a question and its answer for every base; the list of classes comes along."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from mllm_keeplora.config import load_config, parse_config
from mllm_keeplora.data import load_benchmark, readers
from mllm_keeplora.data.classes import ClassList
from mllm_keeplora.data.naming import list_faults
from mllm_keeplora.data.store import write_records
from mllm_keeplora.errors import UserError
from mllm_keeplora.identity import Identity, described_set
from tests.support.mtil_trees import TREES, write_coop, write_mtil
from tests.support.tiny import tiny_config

NAMES = ["cat", "dog", "sea horse"]


@pytest.fixture
def write(tmp_path):
    """Function (classes, rows, tests) -> a folder with a domain of class records and its files."""

    def build(classes=NAMES, rows=None, tests=None):
        rows = rows or [{"id": f"r{i}", "image": f"{i}.png", "label": NAMES[i % 3]} for i in range(9)]
        tests = tests or [{"id": f"t{i}", "image": f"{i}.png", "label": NAMES[i % 3]} for i in range(3)]
        for name, values in (("classes", classes), ("train", rows), ("test", tests)):
            (tmp_path / f"{name}.json").write_text(json.dumps(values))
        return tmp_path

    return build


def load(root, domain=(), **changes):
    own = {"train": "train.json", "test": "test.json", "classes": "classes.json", **dict(domain)}
    benchmark = {"name": "own", "defaults": {"scorer": "exact"}, "domains": {"Pets": own}}
    values = tiny_config(root / "base", root, root / "out", data_root=str(root), **changes)
    config = parse_config({**values, "benchmark": benchmark}, "test")  # in place of the tiny one
    return load_benchmark(config), config


def test_a_class_record_is_a_question_and_its_answer(write):
    benchmark, _ = load(write({"names": NAMES, "prompts": ["a photo of a {}.", "a {}."]}))
    trained, asked = benchmark.train_records("Pets"), benchmark.test_records("Pets")
    assert [(turn.role, turn.text) for turn in trained[2].turns] == [
        ("user", "Which class is shown?"),
        ("assistant", "sea horse"),
    ]
    assert [turn.role for turn in asked[1].turns] == ["user"] and asked[1].answer == "dog" and asked[1].id == "t1"
    assert [media.path.name for media in trained[1].media] == ["1.png"] and trained[0].answer is None
    expected = ClassList.of(NAMES, ["a photo of a {}.", "a {}."])
    assert trained[0].classes is asked[0].classes and trained[0].classes == expected


def test_prompts_and_question_of_the_domain_go_before_those_of_the_file(write):
    root = write({"names": NAMES, "prompts": ["a {}."]})
    benchmark, _ = load(root, {"prompts": ["one {}."], "question": "What is it?"})
    record = benchmark.test_records("Pets")[0]
    assert record.question == "What is it?" and record.classes.texts[0] == ("one cat.",)
    assert load(write())[0].test_records("Pets")[0].classes.texts[0] == ("a photo of a cat.",)


def test_labels_of_rows_may_be_other_than_the_names(write):
    rows = [{"id": i, "image": "a.png", "label": label} for i, label in enumerate(("n1", "n2", "n3"))]
    benchmark, _ = load(write({"names": NAMES, "labels": ["n1", "n2", "n3"]}, rows, rows))
    assert [record.answer for record in benchmark.test_records("Pets")] == NAMES


@pytest.mark.parametrize(("row", "told"), [
    ({"id": 1, "image": "a.png", "label": "horse"}, "label 'horse' is none of the 3 classes of the domain's list"),
    ({"id": 1, "image": "a.png", "label": 2}, "label must be the name of a class, since the domain has a list, got 2"),
    ({"id": 1, "image": "a.png", "text": "What?", "answer": "cat"}, "label must be the name of a class"),
    ({"id": 1, "label": "cat"}, "a class record shows one picture, this one 0"),
    ({"id": 1, "image": ["a.png", "b.png"], "label": "cat"}, "a class record shows one picture, this one 2"),
])  # fmt: skip
def test_a_row_that_is_no_class_record_is_a_sentence(row, told, write):
    benchmark, _ = load(write(rows=[row], tests=[row]))
    for read in (benchmark.train_records, benchmark.test_records):
        with pytest.raises(UserError) as error:
            read("Pets")
        assert told in str(error.value) and "record 0" in str(error.value)


def test_a_row_with_a_label_alone_needs_a_list(write):
    root = write()
    benchmark, _ = load(root, {"classes": None})
    with pytest.raises(UserError, match="unknown shape"):
        benchmark.train_records("Pets")


@pytest.mark.parametrize(("classes", "told"), [
    ("{", "classes.json is not readable JSON"),
    (json.dumps([]), "names: list should have at least 1 item"),
    (json.dumps({"names": ["a"], "promts": ["{}"]}), "did you mean prompts?"),
    (json.dumps([1, 2]), "names.0: input should be a valid string, got 1"),
])  # fmt: skip
def test_a_file_of_classes_that_is_none_is_a_sentence(classes, told, write):
    root = write()
    (root / "classes.json").write_text(classes)
    with pytest.raises(UserError) as error:
        load(root)[0].train_records("Pets")
    assert told in str(error.value)


def test_faults_of_a_list_are_told_all_at_once():
    names = ["cat", "Cat", "sea_horse", "sea horse", "", "dog", "dog"]
    told = list(list_faults(names, ["a photo.", "{} and {}", "a {}."], "Pets"))
    assert len(told) == 6 and all(sentence.startswith("Pets: ") for sentence in told)
    for each in (
        "is empty",
        "'cat' and 'Cat'",
        "'sea_horse' and 'sea horse'",
        "'dog' twice",
        "'a photo.'",
        "'{} and {}'",
    ):
        assert sum(each in sentence for sentence in told) == 1, each
    assert list(list_faults(["cat"], [], "Pets")) == ["Pets: prompts is empty; at least one is needed"]
    assert not list(list_faults(NAMES, ["a {}."], "Pets"))


def test_shots_are_so_many_of_each_class_drawn_by_the_seed(write):
    rows = [{"id": f"r{i}", "image": f"{i}.png", "label": NAMES[0 if i < 6 else i % 3]} for i in range(12)]
    root = write(rows=rows)
    whole = [record.id for record in load(root)[0].train_records("Pets")]
    drawn = {seed: load(root, shots=3, seed=seed)[0].train_records("Pets") for seed in (0, 0, 1)}
    for records in drawn.values():
        assert Counter(record.turns[-1].text for record in records) == {"cat": 3, "dog": 2, "sea horse": 2}
        ids = [record.id for record in records]
        assert ids == sorted(ids, key=whole.index)
    assert [record.id for record in drawn[0]] != [record.id for record in drawn[1]]
    again = load(root, shots=3)[0].train_records("Pets")
    assert [record.id for record in again] == [record.id for record in drawn[0]]
    with pytest.raises(UserError, match="shots counts records of a class, but domain Pets names no `classes`"):
        load(root, {"classes": None}, shots=1)


def test_another_list_prompt_or_question_makes_another_data_set(write):
    root = write({"names": NAMES, "prompts": ["a {}."]})
    before = described_set(load(root)[0], "Pets")
    assert before == described_set(load(root)[0], "Pets") and before["sha256"].keys() == {"train", "test", "classes"}
    digest = before["sha256"]["classes"]
    assert described_set(load(root, {"question": "What?"})[0], "Pets")["sha256"]["classes"] != digest
    assert described_set(load(root, {"prompts": ["one {}."]})[0], "Pets")["sha256"]["classes"] != digest
    write({"names": NAMES[::-1], "prompts": ["a {}."]})
    assert described_set(load(root)[0], "Pets")["sha256"]["classes"] != digest


def test_counts_and_defaults_are_no_part_of_what_a_run_is_known_by(write):
    root = write()
    known = [described_set(load(root, own)[0], "Pets") for own in ({}, {"counts": {"train": 7}}, {"candidates": "own"})]
    assert known[0] == known[1] == known[2]
    assert not {"question", "prompts", "layout", "counts", "candidates"} & known[0]["files"].keys()
    plain = described_set(load(root, {"classes": None})[0], "Pets")
    assert "classes" not in plain["sha256"] and "classes" not in plain["files"]


def test_a_set_without_classes_is_known_as_before(tmp_path):
    config = load_config("mini_dcl")
    assert not {"shots", "eval.prompts"} & config.result_defining().keys()
    assert load_config("mini_dcl", ["shots=4"]).result_defining()["shots"] == 4
    assert load_config("mini_dcl", ["eval.prompts=ensemble"]).result_defining()["eval.prompts"] == "ensemble"


@pytest.fixture
def mtil(tmp_path):
    """Function (*domains, **changes) -> the benchmark of a run over miniatures of some of MTIL's sets."""

    def build(*domains, benchmark=None, **changes):
        own = benchmark or write_mtil(tmp_path, domains)
        root = changes.pop("data_root", str(tmp_path))
        values = tiny_config(tmp_path / "base", tmp_path, tmp_path / "out", data_root=root, **changes)
        config = parse_config({**values, "benchmark": own, "domains": list(domains)}, "test")
        return load_benchmark(config), config

    return build


@pytest.mark.parametrize("name", TREES)
def test_every_published_set_of_mtil_is_read_into_class_records(name, mtil):
    benchmark, _ = mtil(name)
    counts = TREES[name][1]
    trained, asked = benchmark.train_records(name), benchmark.test_records(name)
    assert (len(trained), len(asked)) == (counts["train"], counts["test"])
    classes = trained[0].classes
    assert len(classes.names) == counts["classes"] and classes is asked[0].classes
    assert {record.turns[-1].text for record in trained} == set(classes.names)
    assert {record.answer for record in asked} <= set(classes.names)
    assert all(
        "_" not in each and each in text
        for each, texts in zip(classes.names, classes.texts, strict=True)
        for text in texts
    )
    for record in (trained[0], asked[-1]):
        (media,) = record.media
        assert media.data is not None or media.path.is_file()


def test_names_written_by_hand_stand_for_their_folders(mtil):
    benchmark, _ = mtil("Caltech101", "EuroSAT", "MNIST")
    pictures = {r.media[0].path.parent.name: r.answer for r in benchmark.test_records("Caltech101")}
    assert all(name in benchmark.naming("Caltech101").classes.names for name in pictures.values())
    assert benchmark.naming("Caltech101").labels["crocodile_head"] == "head of a  crocodile"
    assert benchmark.naming("EuroSAT").labels["SeaLake"] == "lake or sea"
    assert [record.answer for record in benchmark.test_records("MNIST")][:2] == ["0 - zero", "1 - one"]
    assert len(benchmark.naming("Caltech101").classes.texts[0]) == 34


def test_a_published_folder_is_parsed_once_and_again_when_its_labels_change(mtil, tmp_path, monkeypatch):
    benchmark, _ = mtil("Aircraft")
    written = []
    monkeypatch.setattr(readers, "write_records", lambda *given: written.append(given) or write_records(*given))
    for _ in range(2):
        assert len(benchmark.train_records("Aircraft")) == 6
    assert len(written) == 1
    labels = tmp_path / "fgvc-aircraft-2013b/data/images_variant_train.txt"
    labels.write_text("\n".join(labels.read_text().splitlines()[1:]))
    assert len(benchmark.train_records("Aircraft")) == 5 and len(written) == 2


def test_the_identity_of_a_published_set_is_that_of_its_rows(mtil, tmp_path):
    benchmark, config = mtil("Aircraft", "MNIST")
    before = Identity.of_config(config, benchmark, None)
    assert before.digest() == Identity.of_config(config, benchmark, None).digest()
    assert before.domains[0]["files"]["layout"] == "aircraft" and before.domains[0]["sha256"].keys() >= {
        "train",
        "test",
    }
    (tmp_path / "fgvc-aircraft-2013b/readme.html").write_text("nothing that matters")
    assert before.digest() == Identity.of_config(config, benchmark, None).digest()
    labels = tmp_path / "fgvc-aircraft-2013b/data/images_variant_test.txt"
    labels.write_text("\n".join(labels.read_text().splitlines()[1:]))
    lines = before.differences(Identity.of_config(config, benchmark, None), "run.json")
    assert lines == ["Aircraft: its data files are not those that the run was started with"]


def test_classes_of_all_or_of_the_seen_domains_compete_where_the_benchmark_says_so(mtil, tmp_path):
    lists = {}
    for rule in ("own", "seen", "all"):
        own = write_mtil(tmp_path / rule, ["DTD", "Food", "OxfordPet"])
        own["defaults"] = {"candidates": rule}
        benchmark, _ = mtil("DTD", "Food", "OxfordPet", benchmark=own, data_root=str(tmp_path / rule))
        lists[rule] = {
            seen: benchmark.candidates_of("Food", seen).names for seen in ((), ("DTD",), ("OxfordPet", "DTD"))
        }
        dtd, food, pets = (benchmark.naming(name).classes for name in ("DTD", "Food", "OxfordPet"))
    assert set(lists["own"].values()) == {food.names}
    assert lists["seen"] == {
        (): food.names,
        ("DTD",): dtd.names + food.names,
        ("OxfordPet", "DTD"): dtd.names + food.names + pets.names,
    }
    assert set(lists["all"].values()) == {dtd.names + food.names + pets.names}
    assert benchmark.candidates_of("Food", ()).texts[0] == dtd.texts[0]


def test_x_tail_asks_among_the_classes_of_ten_sets(tmp_path):
    write_coop(tmp_path, "dtd/images", "dtd/split_zhou_DescribableTextures.json", ["banded", "zig_zag"])
    write_coop(tmp_path, "eurosat/2750", "eurosat/split_zhou_EuroSAT.json", ["Forest", "banded"])
    values = tiny_config(tmp_path / "base", tmp_path, tmp_path / "out", data_root=str(tmp_path), shots=1)
    config = parse_config({**values, "benchmark": "mtil_xtail", "domains": ["DTD", "EuroSAT"]}, "test")
    benchmark = load_benchmark(config)
    assert benchmark.candidates_of("DTD", ()).names == ("banded", "zig zag", "Forest")  # one class that both have
    assert len(benchmark.train_records("DTD")) == 2 and len(benchmark.test_records("DTD")) == 4
    assert benchmark.train_records("EuroSAT")[0].media[0].path.is_file()
