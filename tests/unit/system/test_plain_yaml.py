"""YAML as people mean it: a small file stands for a small value, and nothing is read as what it does not look like."""

from __future__ import annotations

import pytest

from mllm_keeplora.errors import UserError
from mllm_keeplora.system import given
from mllm_keeplora.system.plain_yaml import MOST_VALUES, as_yaml, from_yaml, read_yaml

BOMB = "a0: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
MERGES = "m0: &m0 {k: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize("text", [BOMB, MERGES, "a: [" + "x, " * MOST_VALUES + "x]"], ids=["lists", "merges", "plain"])
def test_a_file_that_stands_for_too_many_values_is_refused(text):
    with pytest.raises(ValueError, match="holds more than 50,000 keys and values"):
        from_yaml(text)


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}"])
def test_an_anchor_that_stands_for_itself_is_refused(text):
    with pytest.raises(ValueError, match="a stands for itself"):
        from_yaml(text)


@pytest.mark.parametrize("text", ["[" * 200, "{a: " * 5000, "- " * 100_000], ids=["lists", "mappings", "dashes"])
def test_yaml_that_is_too_deep_is_refused(text):
    with pytest.raises(ValueError, match="nested more than 100 deep"):
        from_yaml(text)


def test_anchors_and_merges_that_people_write_are_read():
    text = "base: &base {lr: 0.1, epochs: 2}\nmine: {<<: *base, lr: 0.2}\nagain: {<<: *base}\nlist: [*base, *base]\n"
    assert from_yaml(text)["mine"] == {"lr": 0.2, "epochs": 2} and from_yaml(text)["again"]["lr"] == 0.1


def test_a_merged_mapping_that_was_itself_merged_may_say_a_key_again():
    text = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\n"
    assert from_yaml(text) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}


@pytest.mark.parametrize(
    "text", ["010", "-017", "12:30:45", "1:30", "9" * 30, "0x" + "f" * 9000, "!!int ''", "!!int x"]
)
def test_a_number_that_could_be_read_as_another_is_refused(text):
    with pytest.raises(ValueError, match="is no plain number of at most 63 bits; quote it if it is a text"):
        from_yaml(f"a: {text}")


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e999", "1:30.5", "!!float x"])
def test_a_number_that_is_not_finite_is_refused(text):
    with pytest.raises(ValueError, match="is no plain finite number"):
        from_yaml(f"a: {text}")


TAGS = ["!!binary aGk=", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!timestamp 2024-01-01", "!x y",
        "!!python/object:os.system {}", "!!bool x", "!!map [a]", "!!seq {a: 1}", "!!str {a: 1}"]  # fmt: skip


@pytest.mark.parametrize("text", [*TAGS, "? [a]\n: 1", "? {a: 1}\n: 1", "{<<: [1]}", '"\\ud800"', '"\\0"', "*missing"])
def test_what_json_has_no_word_for_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        from_yaml(f"a: {text}" if not text.startswith("?") else text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("2024-01-01", "2024-01-01"), ("0", 0), ("-12", -12), ("1_000", 1000), ("0x1F", 31), ("0b11", 3), ("1e-4", 1e-4),
     ("'12:30'", "12:30"), ("yes", True), ("~", None), ("0o17", "0o17"), ("1.5", 1.5),
     ("9223372036854775807", 2**63 - 1)],
)  # fmt: skip
def test_plain_scalars_are_what_they_look_like(text, value):
    assert from_yaml(f"a: {text}") == {"a": value}


def test_what_would_be_refused_or_misread_is_quoted_when_it_is_written(tmp_path):
    values = {"a": "12:30", "b": "010", "c": ".nan", "d": "2024-01-01", "e": "1e5", "f": "0x1F"}
    (tmp_path / "a.yaml").write_text(as_yaml(values))
    assert read_yaml(tmp_path / "a.yaml") == values


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "&k a: 1\n*k : 2"])
def test_a_key_that_stands_twice_is_refused(text):
    with pytest.raises(ValueError, match="a stands there twice"):
        from_yaml(text)


def test_a_large_file_is_refused_by_its_size(tmp_path):
    (tmp_path / "a.yaml").write_text("a: " + "x" * given.MOST_YAML)
    with pytest.raises(UserError, match="at most 1,048,576 are read"):
        read_yaml(tmp_path / "a.yaml")
