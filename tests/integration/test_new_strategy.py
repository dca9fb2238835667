"""What the contract promises to a strategy that is added: nothing it adds up is lost, and its mistakes are its own."""

from __future__ import annotations

import pytest
import torch

from mllm_keeplora import sequence
from mllm_keeplora.config import parse_config
from mllm_keeplora.sequence import run_sequence
from mllm_keeplora.strategies.baselines.finetune import Finetune
from mllm_keeplora.system import files
from mllm_keeplora.training.fit import Reporter
from tests.integration.processes import differing
from tests.support.plugins import plugin


class Path(Finetune):
    """Sequential LoRA that measures how far its parameters go, as path integrals are added up."""

    def load_state_dict(self, state):
        self.lengths = state.get("lengths", torch.zeros(0))

    def state_dict(self):
        return {"lengths": self.lengths}

    def load_training_state(self, state):
        self.length = state.get("length", torch.zeros(()))

    def training_state(self):
        return {"length": self.length}

    def around_step(self, context, phase, step):
        theta = {name: each.detach().clone() for name, each in context.branches.trainable().items()}
        if phase == "grad":
            self.before = theta
            return
        self.length = self.length + sum((each - self.before[name]).norm() for name, each in theta.items())
        context.log({"length": float(self.length)})

    def after_domain(self, context):
        self.lengths = torch.cat([self.lengths, self.length[None]])


class Interrupted(Exception):
    pass


def begin(settings, output, strategy=Path, **changes) -> None:
    with plugin("lab", STRATEGIES={"path": strategy}):
        values = settings(output, **changes)
        values |= {"strategy": {"name": "path", "rank": 4, "alpha": 8}, "plugins": ["lab"]}
        run_sequence(parse_config(values, origin="test"))


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run that nobody interrupted."""
    output = tmp_path_factory.mktemp("path") / "run"
    begin(settings, output)
    return output


def raise_at(call: int, method, before: bool):
    """The method, but that at one of its calls the process is gone before or after it."""
    calls = []

    def replaced(*args, **keywords):
        calls.append(1)
        if before and len(calls) == call:
            raise Interrupted
        value = method(*args, **keywords)
        if not before and len(calls) == call:
            raise Interrupted
        return value

    return replaced


PLACES = {  # six steps a domain, a checkpoint after every second
    "inside a training": (Reporter, "on_step_end", 9, False),
    "after the last step": (Reporter, "on_step_end", 12, False),
    "after a training": (sequence, "consolidate", 2, True),
    "before its end is entered": (sequence, "consolidate", 2, False),
}
PLACES_OFTEN = ("inside a training", "after a training")


@pytest.mark.parametrize(
    "place",
    [pytest.param(name, marks=() if name in PLACES_OFTEN else pytest.mark.slow) for name in PLACES],
)
def test_what_a_training_adds_up_survives_an_interruption(place, whole, settings, tmp_path):
    owner, name, call, before = PLACES[place]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(owner, name, raise_at(call, getattr(owner, name), before))
        begin(settings, tmp_path / "run")
    begin(settings, tmp_path / "run")
    assert differing(whole, tmp_path / "run") == []
    lengths = files.read_tensors(tmp_path / "run/domains/02_Beta/strategy.safetensors")["lengths"]
    assert len(lengths) == 2 and (lengths > 0).all()
    assert not list((tmp_path / "run").rglob("finished.safetensors"))


def test_what_is_logged_in_a_training_is_in_the_records(whole):
    for domain in ("01_Alpha", "02_Beta"):
        assert files.read_json(whole / "domains" / domain / "gradient.json")["length"] > 0


def test_what_is_logged_before_the_first_domain_is_in_the_ledger(settings, tmp_path):
    class Preparing(Path):
        def prepare(self, context):
            context.log({"seen": 7})

    begin(settings, tmp_path / "run", Preparing, domains=("Alpha",))
    assert files.read_json(tmp_path / "run/run.json")["stages"]["prepare"]["logged"] == {"seen": 7}


@pytest.mark.parametrize("micro", [4, 2])
def test_a_draw_is_dealt_out_to_micro_batches_alike_in_batch_and_extra_loss(micro, settings, tmp_path):
    drawn = {"batch": [], "extra_loss": [], "whole": []}

    class Drawing(Path):
        def batch(self, context, batch, step):
            drawn["batch"].append(step.drawn(100, 6))
            return batch

        def extra_loss(self, context, batch, outputs, step):
            drawn["extra_loss"].append(step.drawn(100, 6))
            return 0.0

        def around_step(self, context, phase, step):
            super().around_step(context, phase, step)
            if phase == "grad":
                drawn["whole"].append(step.drawn(100, 6))

    begin(settings, tmp_path / "run", Drawing, domains=("Alpha",), train={"micro_batch_size": micro, "epochs": 1})
    parts = 4 // micro
    assert drawn["batch"] == drawn["extra_loss"]
    assert all(len(part) == 6 // parts for part in drawn["batch"])
    for i, everything in enumerate(drawn["whole"]):
        dealt = [each for part in drawn["batch"][i * parts : (i + 1) * parts] for each in part]
        assert sorted(dealt) == sorted(everything)


def test_answer_logits_are_those_of_the_training_in_evaluation_mode(settings, tmp_path):
    compared = []

    class Comparing(Path):
        def extra_loss(self, context, batch, outputs, step):
            if step.number == 2:
                one_by_one = [context.passes.answer_logits([(0, record)]) for record in range(3)]
                together = context.passes.answer_logits([(0, 0), (0, 1), (0, 2)])
                assert together.requires_grad and context.branches.model.training
                compared.append(torch.allclose(torch.cat(one_by_one), together, atol=1e-4))
            return 0.0

    begin(settings, tmp_path / "run", Comparing, domains=("Alpha",), train={"epochs": 1})
    assert compared == [True]


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (torch.tensor(float("nan")), r"Mistaken.extra_loss is nan in domain Alpha, optimizer step 0; .* that loss"),
        (torch.ones(3), r"Mistaken.extra_loss must give one number, got shape \(3,\) in domain Alpha"),
    ],
)
def test_a_loss_that_is_no_finite_number_is_blamed_on_the_strategy(extra, told, settings, tmp_path):
    class Mistaken(Path):
        def extra_loss(self, context, batch, outputs, step):
            return extra

    with pytest.raises(RuntimeError, match=told):
        begin(settings, tmp_path / "run", Mistaken, domains=("Alpha",), train={"epochs": 1})
