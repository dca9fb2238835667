"""LwF: its loss against the slow reference, its teacher, and what both do to a step of training."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from mllm_keeplora.adapters import Factors
from mllm_keeplora.models.causal.losses import supervised_logits
from mllm_keeplora.strategies.baselines.finetune import Finetune, FinetuneOptions
from mllm_keeplora.strategies.baselines.lwf import LwF, LwFOptions, distillation
from mllm_keeplora.strategies.context import Step
from tests.oracles import lwf
from tests.support.strategies import context_of, fit, learn, open_branch
from tests.unit.adapters.conftest import adapt, projector_parameters, same
from tests.unit.conftest import encode, logits_of

RANK, ALPHA = 2, 4.0


def strategy_of(**options) -> LwF:
    return LwF(LwFOptions(rank=RANK, alpha=ALPHA, **options))


def alike(one: Factors, other: Factors) -> bool:
    return same(one.A, other.A) and same(one.B, other.B)


@pytest.fixture
def few(tiny_records) -> dict:
    """Eight records a domain: two steps, of which the second has left where the domain began."""
    return {name: records[:8] for name, records in tiny_records.items()}


def moved(adapters, seed=0) -> None:
    """Put random values into what is open for training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.trainable().values():
        parameter.data += torch.randn(parameter.shape, generator=generator) / 4


def extra_of(strategy, context, batch) -> torch.Tensor:
    """The extra loss of a batch as a training asks for it."""
    model = context.branches.model
    with supervised_logits(context.branches.base, batch):
        outputs = model(**{key: value for key, value in batch.items() if key != "labels"})
    return strategy.extra_loss(context, batch, outputs, Step(0, 4))


def answer_logits(model, record, base) -> torch.Tensor:
    """Logits at the answers' tokens of one record that is run alone, hence without padding: (n, vocabulary)."""
    batch = encode(base, [record])
    places = [place for place in range(batch["labels"].shape[1]) if batch["labels"][0, place] != -100]
    return torch.stack([logits_of(model, batch)[0, place - 1] for place in places])


def taught(strategy, base, records, folder, history="merged", full=()):
    """Context of the second domain, its branch open after the first was learnt."""
    adapters = adapt(base, history, full)
    first = context_of(base, adapters, records, 0)
    open_branch(strategy, first)
    fit(strategy, first, folder / "first")
    adapters.restore([adapters.read()], [adapters.read_full()] if full else [])
    context = context_of(base, adapters, records, 1)
    open_branch(strategy, context)
    return context


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_is_that_of_the_reference_and_not_its_mirror_image(temperature):
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(5, 7, generator=generator) for _ in range(2))
    found = distillation(teacher, student, temperature)
    expected = lwf.distillation(teacher.numpy(), student.numpy(), temperature)
    mirrored = lwf.distillation(student.numpy(), teacher.numpy(), temperature)
    assert found.shape == (5,) and (found > 0).all()
    assert found.mean().item() == pytest.approx(expected, rel=1e-5)
    assert abs(expected - mirrored) > 1e-2 * expected


def test_its_gradient_is_the_temperature_times_what_the_softened_answers_differ_by():
    """d/dz T^2 KL = T (softmax(z / T) - softmax(z_teacher / T))."""
    generator = torch.Generator().manual_seed(1)
    teacher, student = (3 * torch.randn(4, 6, generator=generator) for _ in range(2))
    student.requires_grad_(True)
    (gradient,) = torch.autograd.grad(distillation(teacher, student, 2.0).sum(), student)
    expected = 2 * (F.softmax(student / 2, -1) - F.softmax(teacher / 2, -1))
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_logits_of_a_bfloat16_model_are_compared_in_float32():
    generator = torch.Generator().manual_seed(2)
    teacher, student = (3 * torch.randn(4, 6, generator=generator).bfloat16() for _ in range(2))
    assert torch.equal(distillation(teacher, student, 2.0), distillation(teacher.float(), student.float(), 2.0))


def test_the_mean_is_over_answer_tokens_alone(base, few, tmp_path):
    """Records of one and of two turns are padded to one length; alone they have no padding."""
    strategy = strategy_of(strength=0.5, temperature=3.0)
    context = taught(strategy, base, few, tmp_path)
    teacher = copy.deepcopy(context.branches.model)
    moved(context.branches)
    records = [few["Beta"][number] for number in range(3)]
    old = torch.cat([answer_logits(teacher, record, base) for record in records])
    new = torch.cat([answer_logits(context.branches.model, record, base) for record in records])
    batch = encode(base, records)
    assert not batch["attention_mask"].all()
    expected = 0.5 * lwf.distillation(old.numpy(), new.numpy(), 3.0)
    assert extra_of(strategy, context, batch).item() == pytest.approx(expected, rel=1e-3) and expected > 1e-3


@pytest.mark.parametrize("history", ["merged", "factors"])
def test_loss_and_gradient_are_zero_where_the_student_is_its_teacher(base, few, tmp_path, history):
    strategy = strategy_of()
    context = taught(strategy, base, few, tmp_path, history)
    extra = extra_of(strategy, context, encode(base, few["Beta"][:4]))
    theta = context.branches.trainable()
    assert abs(extra.item()) < 1e-6 and len(theta) == 32
    assert all(each.abs().max() < 1e-6 for each in torch.autograd.grad(extra, list(theta.values())))


def test_the_first_domain_has_no_teacher(base, few):
    strategy, context = strategy_of(), context_of(base, adapt(base), few, 0)
    open_branch(strategy, context)
    moved(context.branches)
    assert extra_of(strategy, context, encode(base, few["Alpha"][:4])) == 0.0


# -- the teacher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector", ["keeplora", "full"])
def test_the_teacher_is_the_model_before_the_domain_and_never_changes(new_base, few, tmp_path, projector):
    base = new_base(projector)
    full = projector_parameters(base) if projector == "full" else ()
    assert len(full) == (4 if projector == "full" else 0)
    strategy = strategy_of()
    context = taught(strategy, base, few, tmp_path, full=full)
    batch = encode(base, few["Beta"][:4])
    with supervised_logits(context.branches.base, batch):
        before = logits_of(context.branches.model, batch)
    seen = []

    class Watched(LwF):
        def extra_loss(self, context, batch_of_training, outputs, step):
            seen.append(context.passes.teacher_logits(batch)[None])
            return super().extra_loss(context, batch_of_training, outputs, step)

    fit(Watched(strategy.options), context, tmp_path / "second", epochs=2)
    seen.append(context.passes.teacher_logits(batch)[None])
    with supervised_logits(context.branches.base, batch):
        after = logits_of(context.branches.model, batch)
    assert len(seen) == 5 and (after - before).abs().max() > 1e-2
    assert all(torch.allclose(each, before, atol=1e-5) and not each.requires_grad for each in seen)


@pytest.mark.parametrize(
    ("history", "micro", "checkpointing"), [("merged", 4, False), ("merged", 1, True), ("factors", 2, False)]
)
def test_a_step_is_that_of_the_whole_loss_whatever_its_micro_batches(
    base, few, tmp_path, history, micro, checkpointing
):
    """One plain gradient step, the teacher a model of its own; answers differ in their number of tokens."""
    few = {name: records[:4] for name, records in few.items()}
    strategy, lr = strategy_of(strength=3.0, temperature=2.0), 0.05
    context = taught(strategy, base, few, tmp_path, history)
    branches = context.branches
    teacher = copy.deepcopy(branches.model)
    moved(branches)
    theta = branches.trainable()
    start = {name: parameter.detach().clone() for name, parameter in theta.items()}
    batch = encode(base, few["Beta"])
    counts = (batch["labels"][:, 1:] != -100).sum(dim=1).tolist()
    assert len(set(counts)) > 1

    with torch.no_grad():
        old = teacher(**batch).logits
    outputs = branches.model(**batch)
    answers = batch["labels"][:, 1:] != -100
    p, q = (F.softmax(each[:, :-1][answers].double() / 2, dim=-1) for each in (old, outputs.logits))
    loss = outputs.loss + 3 * 4 * (p * (p.log() - q.log())).sum() / sum(counts)
    gradients = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
    plain = dict(zip(theta, torch.autograd.grad(branches.model(**batch).loss, list(theta.values())), strict=True))

    facts = fit(
        strategy, context, tmp_path / "second", {"optim": "sgd"}, lr=lr, micro_batch_size=micro, schedule="constant",
        warmup_ratio=0.0, max_grad_norm=0.0, gradient_checkpointing=checkpointing,
    )  # fmt: skip
    assert facts["steps"] == 1
    for name, parameter in branches.trainable().items():
        step, expected = start[name] - parameter.detach(), lr * gradients[name]
        assert (step - expected).norm() < 1e-3 * expected.norm()
    assert any((gradients[name] - plain[name]).norm() > 0.1 * plain[name].norm() for name in plain)


# -- training ----------------------------------------------------------------------------------------------------------


def test_without_strength_it_is_sequential_lora_bit_for_bit_and_with_it_it_is_not(new_base, few, tmp_path):
    def two_domains(strategy, folder):
        base = new_base()
        adapters = adapt(base)
        for index in (0, 1):
            context = context_of(base, adapters, few, index)
            factors = learn(strategy, context, folder / str(index), warmup_ratio=0.0)
        return factors

    expected = two_domains(Finetune(FinetuneOptions(rank=RANK, alpha=ALPHA, branch="carried")), tmp_path / "plain")
    assert alike(two_domains(strategy_of(strength=0.0), tmp_path / "without"), expected)
    assert not alike(two_domains(strategy_of(), tmp_path / "with"), expected)


def test_a_strong_teacher_keeps_the_student_nearer(base, few, tmp_path):
    first = strategy_of()
    context = taught(first, base, few, tmp_path)
    adapters, past, far = context.branches, context.branches.past, []
    batch = encode(base, few["Beta"])
    for strength in (0.0, 100.0):
        fit(strategy_of(strength=strength), context, tmp_path / str(strength), epochs=4)
        far.append(extra_of(first, context, batch).item())
        adapters.restore(past, [])
        context = context_of(base, adapters, few, 1)
        open_branch(first, context)
    assert far[0] > 2 * far[1] > 0


def test_nothing_is_kept_between_domains_but_the_branch(base, few, tmp_path):
    strategy = strategy_of()
    branches = taught(strategy, base, few, tmp_path).branches
    assert strategy.state_dict() == {} and len(branches.past) == 1 and branches.branch.carried
    assert set(branches.branch.ranks.values()) == {RANK}
