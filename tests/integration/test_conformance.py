"""What every registered strategy has to keep, whatever it learns: one tiny run each, interrupted once and once not.

A new strategy is found here by its row in the registry; what it needs to run on a tiny model it states in conftest.py.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mllm_keeplora.adapters.mixers.mixing import look_at
from mllm_keeplora.adapters.stored import LIVE, stored_files, trained_of
from mllm_keeplora.checks.memory import estimate
from mllm_keeplora.config import load_config, parse_config
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval.harness import generate
from mllm_keeplora.eval.rows import asked_records
from mllm_keeplora.eval.saved import load_run
from mllm_keeplora.exports.checkpoint import export
from mllm_keeplora.models.base import skeleton
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.strategies import STRATEGIES, Strategy, build_strategy
from mllm_keeplora.system import files
from mllm_keeplora.training.fit import Reporter
from mllm_keeplora.training.trainer import DomainTrainer
from tests.integration.conftest import TRAINED, TRAINED_AT_FIRST, strategy_of
from tests.integration.processes import differing, leftovers, results

# Interrupted in the fast suite, too: a mixer with rules of its own, routers beside a branch.
MOST_TO_LOSE = ("gainlora", "moelora")
FROM_BASE = ("disco", "hide", "independent", "merged", "routed")
PLAIN_AT_FIRST = (
    *FROM_BASE,
    "agem",
    "ewc",
    "finetune",
    "lwf",
    "olora",
    "ortho_lora",
    "owm",
    "reglora",
    "replay",
    "slao",
)


@dataclass
class Seen:
    """What trainings of a run did to the model's parameters."""

    output: Path
    strategy: str
    steps: list[tuple[set[str], set[str]]] = field(default_factory=list)  # with a gradient, declared
    changed: set[str] = field(default_factory=set)  # frozen, and not what they were
    left: tuple[dict, torch.Tensor] | None = None  # records of the last domain, and the open branch's logits of them


class Stopped(Exception):
    pass


@pytest.fixture(scope="module", params=STRATEGIES)
def seen(request, settings, tmp_path_factory) -> Seen:
    """A run of a strategy over two domains, its trainings watched."""
    watched = Seen(tmp_path_factory.mktemp(request.param) / "run", request.param)
    step, train = DomainTrainer.training_step, DomainTrainer.train

    def training_step(self, *args, **keywords):
        loss = step(self, *args, **keywords)
        named = self.context.branches.model.named_parameters()
        with_gradient = {name for name, parameter in named if parameter.grad is not None}
        watched.steps.append((with_gradient, set(self.context.branches.trainable())))
        return loss

    def training(self, *args, **keywords):
        branches = self.context.branches
        frozen = {n: p.clone() for n, p in branches.model.named_parameters() if n not in branches.trainable()}
        outcome = train(self, *args, **keywords)
        after = dict(branches.model.named_parameters())
        watched.changed |= {name for name, values in frozen.items() if not torch.equal(values, after[name])}
        batch = self.context.base.family.training_batch(
            [record.first_exchange() for record in self.context.data.records[:3]]
        )
        branches.model.eval()
        watched.left = batch, _logits(branches.model, batch)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DomainTrainer, "training_step", training_step)
        patch.setattr(DomainTrainer, "train", training)
        _run(settings, watched.output, request.param)
    return watched


@pytest.fixture(scope="module")
def two_plain(settings, tmp_path_factory) -> Path:
    """A run of sequential LoRA that nothing watched."""
    output = tmp_path_factory.mktemp("plain") / "run"
    _run(settings, output, "finetune")
    return output


def _run(settings, output: Path, strategy: str, **changes) -> None:
    values = settings(output, **changes)
    values["strategy"] = strategy_of(strategy)
    run_sequence(parse_config(values, origin="test"))


def _kind(name: str) -> str:
    """A factor by its letter, a mixer's parameter by its own name."""
    return "A" if ".lora_A." in name else "B" if ".lora_B." in name else name.rsplit(".", 1)[1]


def _files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _conversations(saved, count=3):
    """Training records of the run's last domain, and their model inputs."""
    name = list(saved.benchmark.domains)[-1]
    records = [saved.benchmark.train_records(name)[index].first_exchange() for index in range(count)]
    return records, saved.base.family.training_batch(records)


def _logits(model, batch) -> torch.Tensor:
    look_at(model, batch)
    with torch.no_grad():
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits


def _asked(saved) -> str | None:
    return list(saved.benchmark.domains)[-1] if STRATEGIES[saved.config.strategy.name].needs_domain_id else None


def test_what_is_not_declared_to_train_stays_bit_equal(seen):
    assert seen.steps and not seen.changed


def test_exactly_what_is_declared_gets_a_gradient(seen):
    """And what is declared is what the method says that it trains, in every layer."""
    layers = len(load_run(seen.output).base.parts.target_layers)
    wanted = TRAINED.get(seen.strategy, {"A", "B"})
    for number, (with_gradient, declared) in enumerate(seen.steps):
        assert with_gradient == declared and declared
        kinds, is_first = [_kind(name) for name in declared], number < len(seen.steps) / 2
        assert set(kinds) == (TRAINED_AT_FIRST.get(seen.strategy, wanted) if is_first else wanted)
        assert all(kinds.count(factor) == layers for factor in {"A", "B"} & set(kinds))


def test_a_saved_run_is_the_model_that_training_ended_with(seen):
    """Logits of the last domain's open branch, over merged earlier ones or those of a mixer, found again from files.

    Where another branch answers in its place, or others with it, those of the trained one that is beside them.
    """
    batch, left = seen.left
    saved = load_run(seen.output)
    untouched = _logits(saved.base.model, batch)
    assert (untouched - left).abs().max() > 1e-2
    model, unit = saved.restore(len(saved.run.finished_units), asked=_asked(saved)), saved.run.finished_units[-1]
    manifest = files.read_json(saved.run.folder(unit).manifest)
    in_company = manifest["start_from"] == "base" and manifest["combine"] == "gate"  # of branches that trained alone
    answers_otherwise = "instead_of" in manifest and seen.strategy != "mtl_lora"  # which trains what answers, in parts
    if answers_otherwise or in_company:
        # trained at the base, with no other beside it; or beside those before, which it does not answer for
        alone = manifest["start_from"] == "base" or manifest.get("carried", False)
        assert alone or manifest["instead_of"] == "unit"
        assert in_company or not torch.allclose(_logits(model, batch), left, atol=1e-2)
        factors, full = trained_of(saved.run, unit)
        others = [] if alone else saved.placed.adapters.past[:-1]
        saved.placed.adapters.restore([*others, factors], [full] if full else [])
        model = saved.placed.adapters.model
    assert torch.allclose(_logits(model, batch), left, atol=1e-4)


@pytest.mark.parametrize("seen", PLAIN_AT_FIRST, indirect=True)
def test_a_first_domain_without_a_past_is_plain_lora_byte_for_byte(seen, two_plain):
    own, plain = (_files_of(output / "domains/01_Alpha/adapter") for output in (seen.output, two_plain))
    assert own == plain != {}


@pytest.mark.parametrize("seen", FROM_BASE, indirect=True)
def test_a_branch_from_the_base_does_not_depend_on_the_domain_before(seen, settings, tmp_path):
    _run(settings, tmp_path / "run", seen.strategy, domains=("Gamma", "Beta"))
    found, wanted = (_files_of(output / "domains/02_Beta/adapter") for output in (tmp_path / "run", seen.output))
    assert found == wanted != {}


@pytest.mark.parametrize("seen", ["independent", "mtl_lora"], indirect=True)
def test_branches_of_told_domains_forget_nothing_and_the_base_answers_what_was_not_learnt(seen):
    told = results(seen.output)
    (alpha, beta), (alpha_later, _) = told["score_matrix"]
    assert alpha == alpha_later and beta == told["zero_shot"][1]
    assert told["metrics"]["bwt"] == 0.0


@pytest.mark.parametrize(
    "seen",
    [pytest.param(name, marks=() if name in MOST_TO_LOSE else pytest.mark.slow) for name in STRATEGIES],
    indirect=True,
)
def test_a_run_stopped_inside_a_training_goes_on_to_the_same_bytes(seen, settings, tmp_path):
    on_step_end, steps = Reporter.on_step_end, []

    def stop_at_the_ninth(self, *args, **keywords):
        on_step_end(self, *args, **keywords)
        steps.append(self.context.domain.name)
        if len(steps) == 9:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Reporter, "on_step_end", stop_at_the_ninth)
        _run(settings, tmp_path / "run", seen.strategy)
    _run(settings, tmp_path / "run", seen.strategy)
    assert differing(seen.output, tmp_path / "run") == [] and leftovers(tmp_path / "run") == []


def test_a_saved_run_answers_as_the_run_did(seen):
    """Questions of the last row again, from the files alone."""
    saved, name = load_run(seen.output), "Alpha"
    records, part = asked_records(saved.benchmark, name, saved.config)[:4], saved.benchmark.graded(name)
    model = saved.restore(len(saved.run.finished_units), asked=name)
    answers = generate(saved.base, model, records, [part.suffix_for(record) for record in records], 8)
    rows = files.read_json_lines(saved.run.folder(saved.run.finished_units[-1]).predictions(name))
    told = {row["id"]: row["prediction"] for row in rows}
    assert [answer.text for answer in answers] == [told[record.id] for record in records]


def test_teacher_forced_logits_are_those_of_step_by_step_answers_with_a_cache(seen):
    saved = load_run(seen.output)
    model = saved.restore(len(saved.run.finished_units), asked=_asked(saved))
    for record in _conversations(saved)[0]:
        batch = saved.base.family.training_batch([record])
        whole = _logits(model, batch)[0]
        start = int((batch["labels"][0] != -100).nonzero()[0])
        tokens = batch["input_ids"][:, :start]
        prompt = {key: value for key, value in batch.items() if key not in ("labels", "input_ids", "attention_mask")}
        look_at(model, {**prompt, "input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
        with torch.no_grad():
            found = model(input_ids=tokens, **prompt, use_cache=True)
            stepped = [found.logits[0, -1]]
            for place in range(start, whole.shape[0] - 1):
                cache = {"past_key_values": found.past_key_values}
                found = model(input_ids=batch["input_ids"][:, place : place + 1], use_cache=True, **cache)
                stepped.append(found.logits[0, -1])
        assert torch.allclose(torch.stack(stepped), whole[start - 1 : -1], atol=1e-4)


def test_merged_and_live_branches_agree_or_a_merge_is_refused_in_a_sentence(seen, tmp_path):
    saved = load_run(seen.output)
    asked = _asked(saved)
    batch = _conversations(saved)[1]
    live = _logits(saved.restore(len(saved.run.finished_units), asked=asked), batch)
    if STRATEGIES[seen.strategy].combine in LIVE:
        with pytest.raises(UserError, match="depends on the question"):
            saved.load(domain=asked)
        for form in ("merged", "adapter"):
            with pytest.raises(UserError, match="depends on the question"):
                export(saved, form, tmp_path / form, domain=asked)
            assert not (tmp_path / form).exists()
        return
    merged, _ = saved.load(domain=asked)
    factors = load_run(seen.output)
    factors.config = factors.config.model_copy(
        update={"adapters": factors.config.adapters.model_copy(update={"history": "factors"})}
    )
    unmerged = _logits(factors.restore(len(saved.run.finished_units), asked=asked), batch)
    assert torch.allclose(_logits(merged, batch), live, atol=1e-4)
    assert torch.allclose(unmerged, live, atol=1e-3)
    export(saved, "adapter", tmp_path / "adapter", domain=asked)


def test_a_domain_that_has_no_branch_of_its_own_is_named_and_refused(seen, tmp_path):
    saved, has_branches = load_run(seen.output), STRATEGIES[seen.strategy].needs_domain_id
    wanted = r"no branch for --domain 'Delta'; known: Alpha, Beta" if has_branches else "no --domain 'Delta'"
    for act in (lambda: saved.load(domain="Delta"), lambda: export(saved, "merged", tmp_path / "out", domain="Delta")):
        with pytest.raises(UserError, match=wanted):
            act()
    assert not (tmp_path / "out").exists()


def test_reported_storage_is_what_a_saved_run_needs_to_answer(seen, tmp_path):
    saved = load_run(seen.output)
    last, asked, batch = len(saved.run.finished_units), _asked(saved), _conversations(saved)[1]
    needed = stored_files(saved.run, saved.run.finished_units)
    reported = results(seen.output)["stored_bytes"]
    assert reported == {use: sum(path.stat().st_size for path in paths) for use, paths in needed.items()}
    bare = tmp_path / "bare"
    shutil.copytree(seen.output, bare)
    kept = {path.relative_to(seen.output) for path in needed["answering"]}
    for path in bare.rglob("*.safetensors"):
        if path.relative_to(bare) not in kept:
            path.unlink()
    found = _logits(load_run(bare).restore(last, asked=asked), batch)
    assert torch.equal(found, _logits(saved.restore(last, asked=asked), batch))


def test_memory_is_estimated_for_the_stages_whose_hooks_a_strategy_overrides(two_plain, world):
    """Of every row of the registry; train and evaluate are stages of all."""
    base, rows = load_run(two_plain).base, []
    for name, strategy in STRATEGIES.items():
        config = load_config("mini_dcl_finetune", [f"strategy.name={name}"])
        model = skeleton(str(world / "base"), torch.float32)
        shape = (40, 2, 2, torch.float32, False)
        found = estimate(config, build_strategy(config.strategy), base.family, model, base.parts, *shape)
        overridden = {
            "prepare": strategy.prepare is not Strategy.prepare,
            "gradient": strategy.before_domain is not Strategy.before_domain,
            "train": True,
            "consolidate": strategy.after_domain is not Strategy.after_domain,
            "evaluate": True,
        }
        assert list(found.stages) == [stage for stage, has in overridden.items() if has], name
        rows.append(name)
    assert len(rows) == 25


MEASURED = {
    "keeplora": ["gradient", "train", "consolidate"],
    "inflora": ["gradient", "train", "consolidate"],
    "routed": ["train", "consolidate"],
    "ewc": ["train", "consolidate"],
}


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=pytest.mark.slow if name in ("routed", "ewc") else ()) for name in MEASURED]
)
def test_estimated_memory_is_near_the_measured_peak(strategy, monkeypatch):
    """Tiny-llava over eight records of one domain: its weights, past domains and kept bases left out."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import bench_memory

    lines = bench_memory.compared("tiny-llava", strategy)
    assert [line["stage"] for line in lines] == MEASURED[strategy]
    for line in lines:
        assert 0.7 < line["estimated"] / line["measured"] < 1.4, line
