"""A base from anywhere runs no code, reads no pickle, and fills the model that its config describes, or is refused."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

import mllm_keeplora
from mllm_keeplora.checks.records import load_family
from mllm_keeplora.config import BaseConfig, parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.models import load_base
from mllm_keeplora.models.causal import prompt as prompt_module
from mllm_keeplora.models.reading import skeleton, warn_once
from mllm_keeplora.models.weights import refuse_unfit, stored_numbers
from tests.support.hostile import HOSTILE, MARK, edited, write_hostile

DOWN = "language_model.model.layers.0.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def says_yes(monkeypatch, tmp_path):
    """Somebody who answers yes to whatever is asked; code of a base's own is kept in the test's folder."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    warn_once.cache_clear()


@pytest.fixture
def copied(tiny_folder, tmp_path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "base")


def load(folder: Path, **settings: Any) -> Any:
    return load_base(BaseConfig(model=str(folder), **settings), "keeplora")


def with_weights(folder: Path, edit: Callable[[dict], Any]) -> Path:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def split(folder: Path) -> dict[str, str]:
    """Part the weights into two shards; returns the index's map, which is written, too."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for shard, own in halves.items():
        save_file({name: weights[name] for name in own}, folder / shard, {"format": "pt"})
    index = {name: shard for shard, own in halves.items() for name in own}
    write_index(folder, index)
    return index


def write_index(folder: Path, index: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("kind", HOSTILE)
def test_code_of_a_bases_own_is_not_run(kind, tiny_folder, tmp_path):
    folder = write_hostile(tiny_folder, tmp_path / "base", kind)
    with pytest.raises(UserError, match=r"needs code that comes with it, which is not run.*base.trust_remote_code"):
        load(folder)
    for look in (lambda: load_family(BaseConfig(model=str(folder)), str(folder)), lambda: skeleton(str(folder))):
        try:
            look()
        except UserError as error:
            assert "base.trust_remote_code" in str(error)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize("kind", ["tokenizer", "processor", "image processor"])
def test_code_of_a_bases_own_is_run_where_the_config_says_so_which_is_told(kind, tiny_folder, tmp_path, caplog):
    folder = write_hostile(tiny_folder, tmp_path / "base", kind)
    load(folder, trust_remote_code=True)
    is_passed_over = kind == "tokenizer" and Version(transformers.__version__) < Version("5.13")
    assert (tmp_path / MARK).exists() is not is_passed_over  # older ones take a tokenizer of their own for LLaVA
    assert f"base {folder}: code that it brings is RUN on this machine" in caplog.text


def test_a_trusted_models_own_code_is_run(tiny_folder, tmp_path):
    folder = write_hostile(tiny_folder, tmp_path / "base", "model")
    assert type(skeleton(str(folder), trusted=True)).__name__ == "Model"
    assert (tmp_path / MARK).exists()


def test_code_beside_a_class_of_transformers_is_left_alone(tiny_folder, tmp_path):
    own = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
    folder = edited(tiny_folder, tmp_path / "base", "config.json", lambda values: values.update(auto_map=own))
    (folder / "own.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w')")
    assert type(load(folder).model).__name__ == "LlavaForConditionalGeneration"
    assert not (tmp_path / MARK).exists()


def test_who_does_not_trust_a_base_is_identified_as_before():
    values = {"name": "x", "base": {"model": "x"}, "benchmark": "x", "strategy": {"name": "x"}}
    trusting = {**values, "base": {"model": "x", "trust_remote_code": True}}
    untrusting, trusting = (parse_config(each, "test").result_defining() for each in (values, trusting))
    assert trusting.pop("base.trust_remote_code") is True and trusting == untrusting


def test_one_module_reads_what_comes_with_a_base():
    root = Path(mllm_keeplora.__file__).parent
    reads = re.compile(r"(?<!Peft)(Auto\w+|Config|Model)\.from_(pretrained|config)\(|torch\.load\(|import pickle")
    code = [path for path in (*root.rglob("*.py"), *(root.parent / "eval").glob("*.py")) if path.name != "card.py"]
    assert len(code) > 150
    found = [path.name for path in code if reads.search(re.sub(r'"[^"\n]*"', "", path.read_text()))]
    assert {*found} == {"reading.py"}


class Marks:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth"])
def test_pickled_weights_are_not_read_and_the_way_to_convert_them_is_told(name, copied, tmp_path):
    (copied / "model.safetensors").unlink()
    (copied / name).write_bytes(pickle.dumps(Marks(tmp_path / MARK)))
    with pytest.raises(UserError, match=rf"weights in {name} alone; pickles are not read; .*use_safetensors=False"):
        load(copied)
    assert not (tmp_path / MARK).exists()


def test_weights_that_are_converted_as_told_are_read(copied, tmp_path):
    from transformers import AutoModelForImageTextToText

    weights = load_file(copied / "model.safetensors")
    torch.save(weights, copied / "pytorch_model.bin")
    (copied / "model.safetensors").unlink()
    new = shutil.copytree(copied, tmp_path / "new", ignore=shutil.ignore_patterns("*.bin"))
    AutoModelForImageTextToText.from_pretrained(str(copied), use_safetensors=False).save_pretrained(new)
    assert torch.equal(load(new).model.state_dict()["lm_head.weight"], weights["language_model.lm_head.weight"])


def test_an_adapter_beside_a_base_is_refused(copied):
    (copied / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\)"):
        load(copied)


@pytest.mark.parametrize("named", ["../other.safetensors", "adapter_model.bin", "sub/model.safetensors"])
def test_a_config_names_no_weights_of_its_own_choice(named, copied):
    edited(copied, copied, "config.json", lambda values: values.update(transformers_weights=named))
    with pytest.raises(UserError, match=f"transformers_weights is '{named}'; allowed: model.safetensors"):
        load(copied)


def test_shards_load_as_one_file(copied, tiny_folder):
    split(copied)
    one, other = load(tiny_folder).model.state_dict(), load(copied).model.state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("name", ["../two.safetensors", "{tmp}/two.safetensors", "sub/two.safetensors", "two.bin", 3])
def test_a_shard_lies_in_the_folder_itself(name, copied, tmp_path):
    index = split(copied)
    name = name.format(tmp=tmp_path) if isinstance(name, str) else name
    shutil.copy(copied / "two.safetensors", tmp_path)
    write_index(copied, {key: name if shard == "two.safetensors" else shard for key, shard in index.items()})
    with pytest.raises(UserError, match=r"index.json names .*; allowed: \*.safetensors in the same folder"):
        load(copied)


def test_shards_that_are_missing_or_hold_the_same_or_another_tensor_are_named(copied):
    index = split(copied)
    first, second = sorted(index)[:2]
    write_index(copied, {**index, first: "two.safetensors"})
    with pytest.raises(UserError, match=f"says that two.safetensors has the tensor {first}, which it has not"):
        stored_numbers(copied)
    write_index(copied, index)
    twice = load_file(copied / "two.safetensors") | {first: load_file(copied / "one.safetensors")[first]}
    save_file(twice, copied / "two.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"tensor {first} is in one.safetensors and in two.safetensors"):
        stored_numbers(copied)
    (copied / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"names two.safetensors, which is not in its folder"):
        stored_numbers(copied)
    assert second in index


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}']
)
def test_a_broken_index_is_refused(text, copied):
    split(copied)
    (copied / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"model.safetensors.index.json"):
        load(copied)


FILES = {
    "no bytes": lambda whole: b"",
    "a part of the header": lambda whole: whole[:100],
    "cut": lambda whole: whole[:-1000],
    "more than it says": lambda whole: whole + b"more",
    "a header without end": lambda whole: struct.pack("<Q", 1 << 60) + whole[8:],
    "a header that is no JSON": lambda whole: struct.pack("<Q", 20) + b"{" * 20,
    "text": lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_weight_file_is_named(name, copied):
    path = copied / "model.safetensors"
    path.write_bytes(FILES[name](path.read_bytes()))
    with pytest.raises(UserError, match=rf"{path} is damaged"):
        load(copied)


def test_a_missing_tensor_is_not_filled_with_random_numbers(copied):
    with_weights(copied, lambda weights: weights.pop(DOWN))
    with pytest.raises(UserError, match=r"its files lack model.language_model.layers.0.mlp.down_proj.weight, which"):
        load(copied)


def test_a_tensor_of_another_shape_is_refused_with_both(copied):
    with_weights(copied, lambda weights: weights.update({DOWN: torch.ones(3, 4)}))
    with pytest.raises(
        UserError, match=r"layers.0.mlp.down_proj.weight is stored as \(3, 4\), by its config it is \(32"
    ):
        load(copied)


def test_tensors_without_a_place_are_told_once_and_harmless_ones_are_not(copied, caplog):
    with_weights(copied, lambda weights: weights.update(spare=torch.ones(3)))
    load(copied)
    load(copied)
    assert caplog.text.count("no part of the model has a place for spare of its files") == 1
    warn_once.cache_clear()
    caplog.clear()
    with_weights(copied, lambda w: w.update({"old.position_ids": w.pop("spare")}))
    load(copied)
    assert "no part of the model" not in caplog.text


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_not_finite_name_layer_and_file(value, copied):
    with_weights(copied, lambda weights: weights[DOWN].view(-1)[7].fill_(float(value)))
    with pytest.raises(
        UserError, match=r"layers.0.mlp.down_proj.weight holds nan or inf \(.*safetensors: tensor " + DOWN
    ):
        load(copied)


def of_config(place: str, value: Any) -> Callable[[dict], None]:
    def edit(values: dict) -> None:
        *sections, last = place.split(".")
        for section in sections:
            values = values[section]
        values[last] = value

    return edit


CONFIGS = {
    "words for a number": ("text_config.hidden_size", "many", "hidden_size"),
    "a list of a section": ("text_config", [1], "text_config"),
    "another model type": ("model_type", "warp", "model type `warp`"),
    "a model type that is no word": ("model_type", 3, "model type"),
    "another type of a part": ("text_config.model_type", "warp", "warp"),
    "a model without pictures": ("model_type", "llama", "Unrecognized configuration"),
    "no layers": ("text_config.num_hidden_layers", 0, "num_hidden_layers is 0"),
    "fewer than no layers": ("vision_config.num_hidden_layers", -1, "num_hidden_layers is -1"),
    "layers without end": ("text_config.num_hidden_layers", 10**9, "num_hidden_layers is 1000000000"),
    "no heads": ("text_config.num_attention_heads", 0, "ZeroDivisionError"),
    "no width": ("text_config.hidden_size", 0, "is stored as"),
    "terabytes of embeddings": ("text_config.vocab_size", 10**12, "do not belong together"),
    "more embeddings than can be counted": ("text_config.vocab_size", 10**18, "overflow"),
    "terabytes of patches": ("vision_config.image_size", 10**8, "do not belong together"),
    "a default part": ("text_config", None, "do not belong together"),
    "another activation": ("text_config.hidden_act", "warp", "warp"),
    "another dtype": ("dtype", "float99", "float99"),
    "fewer embeddings than tokens": ("text_config.vocab_size", 20, "is stored as"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_describes_no_such_base_is_refused_in_a_sentence(name, copied):
    place, value, part = CONFIGS[name]
    edited(copied, copied, "config.json", of_config(place, value))
    with pytest.raises(UserError) as refused:
        refuse_unfit(copied, False, None)
    said = str(refused.value)
    assert part in said and str(copied) in said and len(said) < 700 and "\n" not in said
    with pytest.raises(UserError):
        load(copied)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "\x00", "[" * 100_000])
def test_a_file_that_is_no_json_or_not_an_object_is_refused_in_a_sentence(name, text, copied):
    (copied / name).write_text(text)
    with pytest.raises(UserError, match=str(copied)):
        load(copied)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json", "model.safetensors"])
def test_a_file_that_is_not_there_is_refused_in_a_sentence(name, copied):
    (copied / name).unlink()
    with pytest.raises(UserError, match=str(copied)):
        load(copied)


def test_a_tokenizer_of_more_tokens_than_the_model_knows_is_refused(copied):
    edited(copied, copied, "tokenizer.json", lambda values: values["model"]["vocab"].update(more=99))
    with pytest.raises(
        UserError, match="its tokenizer has tokens up to number 99, the model embeddings of the first 23"
    ):
        load(copied)


TEMPLATES = {
    "a file": ("{% include '/etc/hostname' %}", "no loader"),
    "Python's own": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a function's module": ("{{ raise_exception.__globals__['os'].system('true') }}", "unsafe"),
    "no end": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "has not ended after"),
    "no end of calls": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a long text": ("{{ 'a' * 3000000 }}", "3,000,000 characters"),
    "all memory": ("{{ 'a' * 10 ** 14 }}", "MemoryError"),
    "a broken program": ("{% if %}", "Expected an expression"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_reaches_out_never_ends_or_is_broken_is_refused(name, copied, monkeypatch):
    text, part = TEMPLATES[name]
    monkeypatch.setattr(prompt_module, "PATIENCE_S", 1)
    (copied / "chat_template.jinja").write_text(text)
    with pytest.raises(UserError, match=rf"chat template cannot be used: .*{part}"):
        load_family(BaseConfig(model=str(copied)), str(copied))


def test_a_template_that_refuses_a_lone_question_is_taken(copied):
    (copied / "chat_template.jinja").write_text("{{ raise_exception('a picture is wanted') }}")
    assert load_family(BaseConfig(model=str(copied)), str(copied)) is not None
