"""A branch that answers other than it was trained: in every use of a run, after every interruption."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mllm_keeplora.adapters import Factors
from mllm_keeplora.adapters.stored import past_of, stored_files, trained_of, updates_of
from mllm_keeplora.config import parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.harness import generate
from mllm_keeplora.eval.rows import asked_records
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.exports.checkpoint import export
from mllm_keeplora.runs import RunDir
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.system import files
from tests.integration.processes import differing, leftovers, results, run_in_child, run_on_two, stages
from tests.integration.test_export import by_peft, by_transformers, own_logits, questions
from tests.integration.test_two_processes import logits
from tests.support import replacing
from tests.support.plugins import plugin, registries_restored

MODULE = "tests.support.replacing"
KINDS = ("halved", "averaged", "resumed", "folded")
CONSOLIDATED = "adapter_consolidated/adapter_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def entered():
    with registries_restored():
        yield


@pytest.fixture(scope="module")
def values(settings):
    """Function (output, kind, **changes) -> the config of a tiny run."""

    def build(output: Path, kind: str, **changes) -> dict:
        given = {**settings(output, **changes), "plugins": [MODULE]}
        return {**given, "strategy": {"name": kind, "rank": 4, "alpha": 8}}

    return build


@pytest.fixture(scope="module", params=KINDS)
def whole(request, values, tmp_path_factory) -> Path:
    """A run with its projector trained in full that nobody interrupted."""
    output = tmp_path_factory.mktemp(request.param) / request.param
    begin(values(output, request.param, adapters={"projector": "full"}))
    return output


def begin(given: dict, **options) -> None:
    run_sequence(parse_config(given, "test"), **options)


def kind_of(run: Path) -> str:
    return json.loads((run / "run.json").read_text())["config"]["strategy.name"]


def summed(branches: list[Factors], layer: str) -> torch.Tensor:
    return sum(each.delta(layer) for each in branches if layer in each.A)


def test_what_answers_is_what_was_given_and_what_was_trained_is_beside_it(whole):
    run, kind = RunDir(whole).load(), kind_of(whole)
    past, trained = past_of(run, run.units), [trained_of(run, unit)[0] for unit in run.units]
    assert len(past.factors) == (2 if kind == "halved" else 1)
    for layer in trained[0].A:
        if kind == "resumed":
            mean = (trained[0].B[layer] + trained[1].B[layer]) / 2
            wanted = trained[1].scaling(layer) * (mean @ trained[1].A[layer])
        elif kind == "folded":
            wanted = trained[0].delta(layer) / 4 + trained[1].delta(layer) / 2
        else:
            wanted = summed(trained, layer) / 2
        found = summed(past.factors, layer)
        assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(
            found, trained[1].delta(layer), atol=1e-3
        )
        changes = sum(each.delta(layer) for each in updates_of(run, run.units))
        assert torch.allclose(changes, found, atol=1e-5)


def test_parameters_trained_in_full_are_replaced_where_they_are_given(whole):
    run, kind = RunDir(whole).load(), kind_of(whole)
    full, trained = past_of(run, run.units).full, [trained_of(run, unit)[1] for unit in run.units]
    assert full and len(full) == (1 if kind == "averaged" else 2)
    for name in full[0]:
        wanted = sum(deltas[name] for deltas in trained) / (2 if kind == "averaged" else 1)
        assert torch.allclose(sum(deltas[name] for deltas in full), wanted, atol=1e-6) and wanted.abs().max() > 1e-4


def test_both_exports_give_the_logits_of_the_run(whole, tmp_path):
    saved = load_run(whole)
    for after in (1, 2):
        own = own_logits(saved, after)
        assert (own - own_logits(saved, 0)).abs().max() > 1e-2
        for form, loaded in (("merged", by_transformers), ("adapter", lambda *given: by_peft(saved, *given))):
            folder = tmp_path / f"{form}{after}"
            export(saved, form, folder, after)
            assert torch.allclose(loaded(folder, questions(saved)), own, atol=1e-4), (form, after)


def test_a_history_of_factors_gives_the_logits_of_a_merged_one(whole):
    saved, other = load_run(whole), load_run(whole)
    adapters = other.config.adapters.model_copy(update={"history": "factors"})
    other.config = other.config.model_copy(update={"adapters": adapters})
    assert torch.allclose(own_logits(other, 2), own_logits(saved, 2), atol=1e-3)


def test_its_bytes_are_counted_to_answer_and_those_that_are_recalled_to_learn(whole):
    run, kind = RunDir(whole).load(), kind_of(whole)
    found = stored_files(run, run.units)
    assert results(whole)["stored_bytes"] == {use: sum(p.stat().st_size for p in paths) for use, paths in found.items()}
    answering, learning = ({str(p.relative_to(whole)) for p in found[use]} for use in found)
    assert f"domains/02_Beta/{CONSOLIDATED}" in answering and (f"domains/01_Alpha/{CONSOLIDATED}" in answering) == (
        kind == "halved"
    )
    projector = {"domains/02_Beta/projector_consolidated.safetensors"} & answering
    assert bool(projector) == (kind == "averaged") and answering | learning <= run.ledger.artefacts.keys()
    trained = {name for name in learning if name.endswith("adapter/adapter_model.safetensors")}
    of = {"halved": [], "averaged": ["01_Alpha", "02_Beta"], "resumed": ["02_Beta"], "folded": []}[kind]
    assert trained == {f"domains/{unit}/adapter/adapter_model.safetensors" for unit in of}
    assert not set(found["answering"]) & set(found["learning"])


def test_a_rotten_one_is_noticed_and_redo_makes_it_again(whole, values, command, tmp_path):
    run, kind = shutil.copytree(whole, tmp_path / "run"), kind_of(whole)
    path = run / "domains/02_Beta" / CONSOLIDATED
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    said = command("inspect", run, "--verify")
    assert (
        said.code == 1 and CONSOLIDATED in said.out + said.err and "--redo 02_Beta/consolidate" in said.out + said.err
    )
    given = values(run, kind, adapters={"projector": "full"})
    with pytest.raises(UserError, match="02_Beta/consolidate"):
        past_of(RunDir(run).load(), RunDir(run).load().units)
    begin(given, redo="02_Beta/consolidate")
    assert differing(whole, run) == [] and path.read_bytes() == (whole / "domains/02_Beta" / CONSOLIDATED).read_bytes()


KILLS = {
    "before what answers is written": ("rename:adapter_consolidated/adapter_model.safetensors", 2),
    "before the manifest names it": ("rename:02_Beta/manifest.json", 1),
    "before it is entered": ("+mllm_keeplora.sequence:consolidate", 2),
    "in the training": ("mllm_keeplora.training.fit:Reporter.on_step_end", 9),
}


@pytest.mark.parametrize(
    "place",
    [pytest.param(name, marks=() if name == "before the manifest names it" else pytest.mark.slow) for name in KILLS],
)
def test_a_run_killed_anywhere_ends_with_the_same_bytes(place, whole, values, tmp_path):
    run = tmp_path / "run"
    given = values(run, kind_of(whole), adapters={"projector": "full"})
    assert run_in_child(given, kill=KILLS[place]) == -9
    assert run_in_child(given) == 0
    assert differing(whole, run) == [] and leftovers(run) == [] and stages(run) == stages(whole)
    for unit in ("01_Alpha", "02_Beta"):
        for path in (whole / "domains" / unit).glob("adapter_consolidated/*"):
            assert path.read_bytes() == (run / path.relative_to(whole)).read_bytes()


def test_a_run_that_inherits_a_domain_starts_from_what_answers_there(whole, values, tmp_path):
    given = values(tmp_path / "next", kind_of(whole), adapters={"projector": "full"})
    begin(given, from_run=whole, after=1)
    assert differing(whole, tmp_path / "next") == []


def test_a_saved_run_answers_alike_when_it_is_asked_again(whole):
    saved = load_run(whole)
    records, part = asked_records(saved.benchmark, "Beta", saved.config)[:4], saved.benchmark.graded("Beta")
    model = saved.restore(2, asked="Beta")
    answers = generate(saved.base, model, records, [part.suffix_for(record) for record in records], 8)
    rows = files.read_json_lines(whole / "domains/02_Beta/predictions/Beta.jsonl")
    told = {row["id"]: row["prediction"] for row in rows}
    assert [answer.text for answer in answers] == [told[record.id] for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_answer_as_one_does(kind, values, tmp_path):
    short = {"eval": {"limit": 2, "zero_shot": False}}
    one, two = (values(tmp_path / name, kind, **short) for name in ("one", "two"))
    assert run_in_child(one) == 0
    assert [(end.code, end.err[-4000:] if end.code else "") for end in run_on_two(two, tmp_path)] == [(0, "")] * 2
    one, two = (load_run(tmp_path / name) for name in ("one", "two"))
    before = logits(one, "finetune", 0)
    found, wanted = (logits(saved, "finetune", 2) for saved in (two, one))
    assert (found - wanted).norm() < 1e-3 * (wanted - before).norm()


# -- mistakes of a strategy ---------------------------------------------------------------------------------------


def refused(mistaken, values, output: Path, match: str, error: type[Exception]) -> None:
    with plugin("lab", STRATEGIES={"mistaken": mistaken}), pytest.raises(error, match=match):
        begin({**values(output, "mistaken"), "plugins": ["lab"]})


class Large(replacing.Halved):
    def after_domain(self, context):
        factors = context.branches.read()
        layer = next(iter(factors.A))
        factors.A[layer] = factors.A[layer][:, 1:]
        context.answer_as(factors)


class Unknown(replacing.Halved):
    def after_domain(self, context):
        factors = context.branches.read()
        context.answer_as(Factors({"nowhere": next(iter(factors.A.values()))}, {}, {"nowhere": 1.0}))


class Full(replacing.Halved):
    def after_domain(self, context):
        context.answer_as(context.branches.read(), full={"nowhere": torch.zeros(1)})


@pytest.mark.parametrize(
    ("mistaken", "told"),
    [
        (Large, r"the branch to answer has \(d_out, d_in\)"),
        (Unknown, "nowhere is no target"),
        (Full, "got .'nowhere'."),
    ],
)
def test_a_branch_that_fits_no_layer_is_refused(mistaken, told, values, tmp_path):
    refused(mistaken, values, tmp_path / "run", told, ValueError)


def test_one_branch_cannot_stand_for_those_that_are_not_merged(values, tmp_path):
    class Asked(replacing.Averaged):
        combine = "oracle"

    refused(Asked, values, tmp_path / "run", "Asked answers as one branch instead of all, .* by oracle", RuntimeError)


def test_a_branch_that_a_strategy_does_not_say_it_recalls_is_not_given(values, tmp_path):
    class Forgetful(replacing.Averaged):
        recalls = "none"

    refused(Forgetful, values, tmp_path / "run", "asks in domain 1 for what domain 0 trained; .* 'none'", RuntimeError)
