"""A tiny CLIP and a tiny SigLIP go through a sequence of class data: interrupted, in two processes, under ZeRO-2."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
import torch

from mllm_keeplora.adapters import Factors
from mllm_keeplora.checks.run import check_run
from mllm_keeplora.config import BaseConfig, load_config, parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.asking import ask
from mllm_keeplora.eval.checkpoints import Checkpoint, evaluate_checkpoint
from mllm_keeplora.eval.saved import evaluate, load_run
from mllm_keeplora.exports.checkpoint import export
from mllm_keeplora.models import load_base
from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.strategies import STRATEGIES
from mllm_keeplora.system import files
from tests.integration.conftest import strategy_of
from tests.integration.processes import differing, leftovers, results, run_in_child, run_on_two, stages
from tests.support.mtil_trees import write_mtil
from tests.support.tiny import tiny_config
from tests.support.tiny_dual import DUAL_BASES, RELATIVES, class_benchmark, write_class_data, write_tiny_clip

REFUSED = ("disco", "gainlora", "hide", "moelora", "routed")
ALLOWED = [name for name in STRATEGIES if name not in REFUSED]
FAST = ("keeplora", "replay", "sdlora")  # frozen A, batches of several lists, magnitudes
KEEPLORA = {"energy_weights": 0.5, "energy_features": 0.9}
FIT, PROBES = "mllm_keeplora.training.fit", "mllm_keeplora.probes.gradients"
KILLS = {  # at which call
    "gradient": (f"{PROBES}:mean_by_row", 4),
    "train": (f"{FIT}:Reporter.on_step_end", 9),
    "evaluate": ("mllm_keeplora.eval.harness:Journal.add", 5),
}


@pytest.fixture(scope="module")
def dual_world(tmp_path_factory) -> Path:
    """A folder with a base of each kind, and `data` of class records."""
    root = tmp_path_factory.mktemp("dual_world")
    for kind, write in DUAL_BASES.items():
        write(root / kind)
    write_class_data(root / "data", train=16, test=12, domains=("Alpha", "Beta"))
    return root


@pytest.fixture(scope="module")
def settings_of(dual_world):
    """Function (kind of base, output, strategy's name, **changes) -> the config of a run over two lists of classes."""

    def build(kind: str, output: Path, name: str = "keeplora", **changes) -> dict:
        options = {**strategy_of(name), **(KEEPLORA if name == "keeplora" else {})}
        changes["strategy"] = {**options, **changes.get("strategy", {})}
        changes["train"] = {"lr": 3e-2, "epochs": 2, "probe_batch_size": 4, **changes.get("train", {})}
        values = tiny_config(dual_world / kind, dual_world / "data", output, **changes)
        own = {"benchmark": class_benchmark(dual_world / "data", ("Alpha", "Beta")), "strategy": changes["strategy"]}
        return {**values, **own, "adapters": {"projector": "frozen"}}

    return build


@pytest.fixture(scope="module", params=DUAL_BASES)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(kind, settings_of, tmp_path_factory) -> Path:
    """A run of KeepLoRA+ that nobody touched. Read only."""
    output = tmp_path_factory.mktemp("dual_runs") / kind
    assert run_in_child(settings_of(kind, output, strategy={"prototypes": "cosine"})) == 0
    return output


def test_a_sequence_is_learnt_and_graded(whole):
    found = results(whole)
    assert found["domains"] == ["Alpha", "Beta"] and len(found["score_matrix"]) == 2
    rows = files.read_json_lines(whole / "domains/02_Beta/predictions/Beta.jsonl")
    for row in rows:
        assert {row["prediction"], row["second"]} == {"left", "right"} and 0.5 <= row["probability"] <= 1.0


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each == "train" else pytest.mark.slow) for each in KILLS]
)
def test_a_run_that_is_killed_ends_with_the_same_bytes(name, kind, whole, settings_of, tmp_path):
    values = settings_of(kind, tmp_path / "run", strategy={"prototypes": "cosine"})
    assert run_in_child(values, kill=KILLS[name]) == -signal.SIGKILL
    assert not (tmp_path / "run" / "results.json").exists()
    assert run_in_child(values) == 0
    assert differing(tmp_path / "run", whole) == []
    assert stages(tmp_path / "run") == stages(whole) and leftovers(tmp_path / "run") == []


@pytest.mark.parametrize("engine", [pytest.param(None, marks=pytest.mark.slow), "zero2"])
def test_two_processes_learn_what_one_does(engine, kind, whole, settings_of, tmp_path):
    train = {"micro_batch_size": 1}  # a Trainer that shifted labels would count none
    values = settings_of(kind, tmp_path / "run", strategy={"prototypes": "cosine"}, train=train, deepspeed=engine)
    ends = run_on_two(values, tmp_path)
    assert [(end.code, end.err[-4000:] if end.code else "") for end in ends] == [(0, "")] * 2
    for unit in ("01_Alpha", "02_Beta"):
        found, wanted = (Factors.load(run / "domains" / unit / "adapter") for run in (tmp_path / "run", whole))
        for layer in wanted.B:
            assert (found.delta(layer) - wanted.delta(layer)).norm() < 2e-2 * wanted.delta(layer).norm(), layer
        P, wanted_P = (
            files.read_tensors(run / "domains" / unit / "prototypes.safetensors")["P"]
            for run in (tmp_path / "run", whole)
        )
        torch.testing.assert_close(P, wanted_P, rtol=1e-2, atol=1e-3)
    assert stages(tmp_path / "run") == stages(whole)


def test_prototypes_start_at_class_means_and_answer_for_their_own_list_alone(whole, kind, tmp_path):
    saved = load_run(whole)
    start = files.read_tensors(whole / "domains/01_Alpha/init.safetensors")["prototypes"].double()
    records, names = saved.benchmark.train_records("Alpha"), saved.benchmark.naming("Alpha").classes.names
    model = saved.restore(0)
    rows = {name: [] for name in names}
    for record in records:  # of the untouched base: the domain is the first
        with torch.no_grad():
            pixels = saved.base.family.question_batch([record])["pixel_values"]
            seen = model.get_image_features(pixel_values=pixels)
        seen = getattr(seen, "pooler_output", seen)[0].double()
        rows[record.turns[-1].text].append(seen / seen.norm())
    for place, name in enumerate(names):
        mean = sum(rows[name]) / len(rows[name])
        torch.testing.assert_close(start[place], mean / mean.norm(), rtol=1e-5, atol=1e-6)
    after = saved.restore(1)
    held = dict(after.class_prototypes.items()) if hasattr(after, "class_prototypes") else {}
    assert set(held) == {saved.benchmark.naming("Alpha").classes.digest}
    assert len(dict(saved.restore(2).class_prototypes.items())) == 2
    assert not hasattr(saved.restore(0), "class_prototypes")
    with pytest.raises(UserError, match=r"a merged checkpoint has no place for the prototypes.*--without-prototypes"):
        export(saved, "merged", tmp_path / "merged")
    export(saved, "merged", tmp_path / "merged", without_prototypes=True)
    assert "class_prototypes" not in "".join(files.read_tensors(tmp_path / "merged" / "model.safetensors"))


def test_a_bare_base_and_a_saved_run_are_graded_alike(kind, whole, dual_world, tmp_path):
    scores = evaluate_checkpoint(Checkpoint.named(dual_world / kind), str(yaml_of(whole)), tmp_path / "bare")
    assert [scores[name] for name in ("Alpha", "Beta")] == results(whole)["zero_shot"]
    assert list(evaluate(whole, after=1).values()) == results(whole)["score_matrix"][0]


def yaml_of(run: Path) -> Path:
    return run / "config.yaml"


def test_pictures_are_compared_with_named_classes(kind, whole, dual_world):
    picture = sorted((dual_world / "data/Alpha/images").glob("test_*.png"))[0]
    told = ask(whole, images=[picture], classes=["red", "green", "blue"]).splitlines()
    shares = [float(line.split("%")[0]) for line in told]
    assert sorted(line.split()[-1] for line in told) == ["blue", "green", "red"]
    assert sum(shares) == pytest.approx(100, abs=0.2) and shares == sorted(shares, reverse=True)
    assert ask(whole, images=[picture], domain="Beta").count("\n") == 1
    assert len(ask(dual_world / kind, images=[picture], classes=["red", "blue"]).splitlines()) == 2
    for asked, said in (
        ({"question": "what is it?", "classes": ["a"]}, "cannot be asked 'what is it"),
        ({}, "chooses from classes: give --classes"),
        ({"domain": "Bta"}, "has no --domain 'Bta'; known: Alpha, Beta"),
        ({"classes": ["a", "a"]}, "must be names that differ"),
        ({"classes": ["a" * 3000] * 2}, r"differ, got .a{199}\.\.\.$"),
    ):
        with pytest.raises(UserError, match=said):
            ask(whole, images=[picture], **asked)
    with pytest.raises(UserError, match="is shown one picture, got 0"):
        ask(whole, classes=["red"])


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=() if each in FAST else pytest.mark.slow) for each in ALLOWED]
)
def test_a_strategy_learns_and_its_merge_is_what_it_answered(name, settings_of, tmp_path):
    output = tmp_path / "run"
    assert run_in_child(settings_of("clip", output, name)) == 0
    saved = load_run(output)
    after, domain = len(saved.run.finished_units), "Beta" if STRATEGIES[name].needs_domain_id else None
    export(saved, "merged", tmp_path / "merged", domain=domain)
    plain = load_base(BaseConfig(model=str(tmp_path / "merged")), "frozen", ())
    batch = plain.family.training_batch(saved.benchmark.train_records("Beta")[:6])
    with torch.no_grad():
        wanted = saved.restore(after, domain)(**inputs_of(batch)).logits_per_image
        untouched = saved.restore(0)(**inputs_of(batch)).logits_per_image
        found = plain.model(**inputs_of(batch)).logits_per_image
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(wanted, untouched, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "keeplora"])
@pytest.mark.parametrize("relative", RELATIVES)
def test_relatives_of_clip_go_through_a_sequence(relative, name, dual_world, settings_of, tmp_path):
    if not (dual_world / relative).exists():
        RELATIVES[relative](dual_world / relative)
    values = settings_of(relative, tmp_path / "run", name, train={"epochs": 1})
    assert run_in_child(values) == 0
    assert len(results(tmp_path / "run")["score_matrix"]) == 2
    assert list(evaluate(tmp_path / "run", after=1).values()) == results(tmp_path / "run")["score_matrix"][0]


@pytest.mark.parametrize("name", REFUSED)
def test_mixers_that_look_at_frozen_parts_are_refused_in_a_sentence(name, settings_of, tmp_path):
    config = parse_config(settings_of("clip", tmp_path / "run", name), "test")
    with pytest.raises(UserError, match=rf"^strategy {name} weighs its branches by what frozen parts of a base see"):
        check_run(config)


def test_settings_of_generation_are_refused_for_two_towers(settings_of, tmp_path):
    values = settings_of("clip", tmp_path / "run", train={"max_length": 64})
    values |= {"eval": {**values["eval"], "max_new_tokens": 8}, "deepspeed": "zero3"}
    with pytest.raises(UserError) as told:
        check_run(parse_config(values, "test"))
    began = [re.split(" is |:", line)[0] for line in told.value.sentences]
    assert began == ["deepspeed 'zero3'", "train.max_length", "eval.max_new_tokens"]


def test_classes_of_what_was_learnt_compete_where_the_benchmark_says_so(settings_of, tmp_path):
    values = settings_of("clip", tmp_path / "run", "finetune")
    for part in values["benchmark"]["domains"].values():
        part["candidates"] = "seen"
    assert run_in_child(values) == 0
    rows = {
        after: files.read_json_lines(tmp_path / "run" / "domains" / after / "predictions/Beta.jsonl")
        for after in ("00_base", "01_Alpha", "02_Beta")
    }
    named = {
        after: {name for row in each for name in (row["prediction"], row["second"])} for after, each in rows.items()
    }
    assert named["00_base"] == {"left", "right"}  # its own alone: nothing was learnt
    assert named["01_Alpha"] | named["02_Beta"] > {"left", "right"} or named["01_Alpha"] - {"left", "right"}
    before = results(tmp_path / "run")["score_matrix"]
    assert list(evaluate(tmp_path / "run", after=1).values()) == before[0]


def test_several_texts_of_a_class_are_graded_together_if_asked(settings_of, tmp_path):
    shares = {}
    for prompts in ("first", "ensemble"):
        values = settings_of("clip", tmp_path / prompts, "finetune")
        values["eval"] = {**values["eval"], "prompts": prompts}
        assert run_in_child(values) == 0
        rows = files.read_json_lines(tmp_path / prompts / "domains/00_base/predictions/Alpha.jsonl")
        shares[prompts] = [row["probability"] for row in rows]
    assert shares["first"] != shares["ensemble"]


def test_a_check_of_mtil_finds_every_fault_of_a_tree_at_once(tmp_path):
    """The shipped run over miniatures of the published folders, whose counts are wrong as they are few."""
    names = ["Aircraft", "DTD", "EuroSAT"]
    write_mtil(tmp_path, names)
    write_tiny_clip(tmp_path / "clip", positions=77)
    folders = sorted(each.name for each in (tmp_path / "eurosat/2750").iterdir())
    (tmp_path / "twice.json").write_text(json.dumps({"names": ["forest", *folders[1:9], "Forest"], "labels": folders}))
    (tmp_path / "fgvc-aircraft-2013b/data/images/0000003.jpg").write_bytes(b"no picture")
    long = "a photo " * 40 + "of a {}"
    own = {"EuroSAT": {"classes": "twice.json"}, "DTD": {"prompts": [long]}}
    benchmark = {"from": "mtil", "domains": own}
    words = [f"benchmark={json.dumps(benchmark)}", f"domains={json.dumps(names)}", f"data_root={tmp_path}"]
    config = load_config("mtil_clip_vitb16", [*words, f"base.model={tmp_path / 'clip'}", f"output={tmp_path / 'out'}"])
    with pytest.raises(UserError) as told:
        check_run(config)
    for said in (
        r"Aircraft: 3 classes, but the published set has 100",  # classes are missing
        r"Aircraft: 6 train records, but the published set has 3,334",
        r"EuroSAT, classes of .*twice.json: class names must differ, .*; there is 'forest' and 'Forest'",
        r"DTD: class 'banded': 'a photo .* has 85 tokens, the text tower has places for 77",
        r"image .*0000003.jpg cannot be read",
    ):
        assert any(re.search(said, sentence) for sentence in told.value.sentences), (said, told.value.sentences)
