"""Asking and grading: the same answers in any batch, a journal that survives, an even thinning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mllm_keeplora.config import EvalConfig
from mllm_keeplora.data import TestSet
from mllm_keeplora.data.readers import read_test
from mllm_keeplora.errors import UserError
from mllm_keeplora.eval import harness
from mllm_keeplora.eval.harness import Answer, Journal, evaluate_set, forget_journals, generate
from mllm_keeplora.eval.rows import collapses
from mllm_keeplora.models import causal
from mllm_keeplora.models.causal.decoding import Decoded
from mllm_keeplora.runs import DomainDir
from mllm_keeplora.system import files

QUESTIONS = ["where ?", "what colour is the square where it is ?", "is it red ?", "what is the colour of the square ?"]


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> list:
    """Twelve questions of unequal length, so that most batches hold padding."""
    from tests.support.tiny import write_tiny_data

    root = write_tiny_data(tmp_path_factory.mktemp("asked"), train=1, test=12, domains=("Alpha",))
    rows = json.loads((root / "Alpha" / "test.json").read_text())
    for index, row in enumerate(rows):
        row["text"] = QUESTIONS[index * 7 % len(QUESTIONS)]
    (root / "Alpha" / "test.json").write_text(json.dumps(rows))
    return read_test(root / "Alpha" / "test.json", root / "Alpha")


PART = TestSet(test="test.json", max_new_tokens=4)


def answers(base, records, folder: Path, batch_size: int, part: TestSet = PART) -> list[str]:
    path = folder / f"batch{batch_size}.jsonl"
    evaluate_set(base, base.model, records, part, path, EvalConfig(batch_size=batch_size))
    return [row["prediction"] for row in files.read_json_lines(path)]


@pytest.mark.parametrize("batch_size", [3, 5, 12])
def test_batches_answer_as_single_questions_do(batch_size, base, records, tmp_path):
    single = answers(base, records, tmp_path, 1)
    assert len(set(single)) > 2, "a model that always says the same would prove nothing"
    assert answers(base, records, tmp_path, batch_size) == single


def test_predictions_are_in_the_order_of_the_file_with_scores(base, records, tmp_path):
    path = tmp_path / "p.jsonl"
    percent = evaluate_set(base, base.model, records, PART, path, EvalConfig(batch_size=5))
    rows = files.read_json_lines(path)
    assert [row["id"] for row in rows] == [record.id for record in records]
    assert [row["question"] for row in rows] == [record.question for record in records]
    assert [list(row)[:5] for row in rows] == [["id", "question", "answer", "prediction", "score"]] * len(rows)
    assert {key for row in rows for key in list(row)[5:]} <= {"cut"}
    assert percent == pytest.approx(100 * sum(row["score"] for row in rows) / len(rows))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["p.figures.json", "p.jsonl"]


def test_a_prompt_suffix_and_a_token_limit_reach_the_model(base, records, tmp_path):
    plain = answers(base, records, tmp_path, 1)
    suffix = TestSet(test="test.json", max_new_tokens=4, prompt_suffix=" yes no yes no")
    assert answers(base, records, tmp_path, 1, suffix) != plain
    short = TestSet(test="test.json", max_new_tokens=1)
    assert max(len(text.split()) for text in answers(base, records, tmp_path, 1, short)) <= 1
    assert max(len(text.split()) for text in plain) > 1


def test_an_answer_that_reached_the_token_limit_is_marked(base, records, tmp_path, monkeypatch):
    """The end mark is what tells: the same answer with room for it is not cut."""
    import torch

    def spoken(model, batch, *limits):
        new = torch.full((len(batch["input_ids"]), 4), 17)
        new[::2, 2:] = base.model.generation_config.eos_token_id
        return Decoded(new, torch.zeros(len(new), dtype=torch.bool))

    monkeypatch.setattr(causal, "greedy", spoken)
    answers = generate(base, base.model, records, [""] * len(records), 4)
    assert [answer.is_cut for answer in answers] == [False, True] * (len(records) // 2)
    evaluate_set(base, base.model, records, PART, tmp_path / "p.jsonl", EvalConfig(batch_size=12))
    assert sum(row.get("cut", False) for row in files.read_json_lines(tmp_path / "p.jsonl")) == len(records) // 2


@pytest.mark.parametrize(("in_step", "settle_ties"), [(False, True), (True, True), (False, False)])
def test_a_close_call_is_asked_again_alone(base, records, monkeypatch, in_step, settle_ties):
    """Not where processes answer in step: the others would wait for a question that they do not have; nor unasked."""
    import torch

    asked = []

    def spoken(model, batch, *limits):
        rows = len(batch["input_ids"])
        asked.append(rows)
        new = torch.full((rows, 1), 17 if rows > 1 else 18)
        return Decoded(new, torch.tensor([rows == 1 or row in (1, 4) for row in range(rows)]))

    monkeypatch.setattr(causal, "greedy", spoken)
    monkeypatch.setattr(harness, "keeps_step", lambda model: in_step)
    texts = [answer.text for answer in generate(base, base.model, records[:6], [""] * 6, 4, settle_ties)]
    in_batch, alone = base.prompt.answers(torch.tensor([[17], [18]]))
    again = (1, 4) if settle_ties and not in_step else ()
    assert asked == [6] + [1] * len(again)
    assert texts == [alone if row in again else in_batch for row in range(6)]


def test_a_suffix_may_depend_on_the_gold_answer(records):
    part = TestSet(test="t.json", prompt_suffix={"Yes|No": " yes or no ?", "*": " which ?"})
    assert [part.suffix_for(replace(records[0], answer=gold)) for gold in ("Yes", "No", "yes", "A")] == [
        " yes or no ?", " yes or no ?", " which ?", " which ?",
    ]  # fmt: skip
    assert TestSet(test="t.json", prompt_suffix={"Yes": " ?"}).suffix_for(replace(records[0], answer="B")) == ""


def test_a_set_that_is_graded_elsewhere_leaves_what_to_hand_in(base, records, tmp_path):
    part = TestSet(test="t.json", max_new_tokens=2, scorer="mathvista", prompt_suffix=" yes ?")
    unknown = [replace(record, answer=None) for record in records]
    assert evaluate_set(base, base.model, unknown, part, tmp_path / "p.jsonl", EvalConfig(batch_size=5)) is None
    assert {row["score"] for row in files.read_json_lines(tmp_path / "p.jsonl")} == {None}
    lines = files.read_json_lines(tmp_path / "p.submit.jsonl")
    assert [line["question_id"] for line in lines] == [record.id for record in records]
    assert all(line["prompt"].endswith(" yes ?") and "text" in line for line in lines)


# -- the journal -------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_asks_nothing_twice_and_ends_the_same(base, records, tmp_path, monkeypatch):
    asked = []

    def counted(base, model, records, *how):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([record.id for record in records])
        return generate(base, model, records, *how)

    whole = answers(base, records, tmp_path, 3)
    monkeypatch.setattr(harness, "generate", counted)
    path = tmp_path / "again.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_set(base, base.model, records, PART, path, EvalConfig(batch_size=3))
    assert not path.exists()
    [journal] = tmp_path.glob("*.part")
    with open(journal, "a") as handle:
        handle.write('{"batch": 2, "answers": {"0": "ha')  # a line that a killed process did not finish

    first = list(asked)
    asked[:] = []
    monkeypatch.setattr(harness, "generate", lambda *a: asked.append([r.id for r in a[2]]) or generate(*a))
    evaluate_set(base, base.model, records, PART, path, EvalConfig(batch_size=3))
    assert [row["prediction"] for row in files.read_json_lines(path)] == whole
    assert len(first) == len(asked) == 2
    assert sorted(name for batch in first + asked for name in batch) == sorted(record.id for record in records)
    assert list(tmp_path.glob("*.part")) == []


def test_a_journal_keeps_whole_lines_and_drops_a_half_one(tmp_path):
    journal = Journal(tmp_path / "a.part", "[1]")
    journal.add(0, {0: Answer("one", False), 3: Answer("two\nlines", True)})
    journal.add(1, {1: Answer("é", False)})
    text = (tmp_path / "a.part").read_bytes().decode("ascii")  # so that a line that is cut anywhere can be read
    for cut in range(0, len(text) + 1, 3):
        (tmp_path / "b.part").write_text(text[:cut], encoding="utf-8")
        again = Journal(tmp_path / "b.part", "[1]")
        whole = text[:cut].count("\n")
        kept = again.answers
        assert len(kept) in {max(0, whole - 1), whole}  # a line may be whole but for its end
        assert all(kept[number] == journal.answers[number] for number in kept)
        again.add(5, {9: Answer("more", False)})
        assert Journal(tmp_path / "b.part", "[1]").answers == again.answers


def test_a_kept_journal_answers_a_second_time_and_another_model_is_asked_anew(base, records, tmp_path, monkeypatch):
    path, asked = tmp_path / "predictions" / "p.jsonl", []
    path.parent.mkdir()
    keep = {"settings": EvalConfig(batch_size=5), "keep_journal": True}
    evaluate_set(base, base.model, records, PART, path, asked_of="one", **keep)
    first = path.read_bytes()
    path.unlink()
    monkeypatch.setattr(harness, "generate", lambda *a: asked.append(1) or generate(*a))
    evaluate_set(base, base.model, records, PART, path, asked_of="one", **keep)
    assert path.read_bytes() == first and not asked
    evaluate_set(base, base.model, records, PART, path, asked_of="two", **keep)
    assert len(asked) == 3
    (path.parent / "p.jsonl.rank7.part").write_text("of a process that no longer takes part")
    (path.parent / "q.jsonl.rank0.part").write_text("of a set that is not done")
    forget_journals(DomainDir(tmp_path), ["p"])
    assert sorted(each.name for each in path.parent.iterdir()) == ["p.figures.json", "p.jsonl", "q.jsonl.rank0.part"]


def test_a_journal_of_another_question_set_is_not_used(tmp_path):
    Journal(tmp_path / "a.part", "[1]").add(0, {0: Answer("one", False)})
    assert Journal(tmp_path / "a.part", "[2]").answers == {}


def test_another_batch_size_starts_the_plan_afresh(base, records, tmp_path):
    identities = {harness._identity(base, records, PART, [size, 4]) for size in (1, 2, 3)}
    assert len(identities) == 3
    assert harness._identity(base, records[:-1], PART, [3, 4]) not in identities
    plan = harness._plan(base, records, 5)
    assert [len(batch) for batch in plan] == [5, 5, 2]
    assert sorted(index for batch in plan for index in batch) == list(range(12))
    lengths = [base.prompt.length(records[index]) for batch in plan for index in batch]
    assert lengths == sorted(lengths)


def test_a_limit_thins_evenly_and_suites_have_their_own(tmp_path):
    from mllm_keeplora.config import parse_config
    from mllm_keeplora.data import load_benchmark
    from mllm_keeplora.eval.rows import asked_records
    from tests.support.tiny import tiny_config, write_tiny_data

    write_tiny_data(tmp_path, train=1, test=12, domains=("Alpha", "Beta", "Gamma"))
    values = tiny_config(tmp_path, tmp_path, tmp_path, eval={"limit": 4, "suite_limit": 3})
    config = parse_config(values, origin="test")
    benchmark = load_benchmark(config)
    assert [record.id for record in asked_records(benchmark, "Beta", config)] == ["test0", "test3", "test6", "test9"]
    assert [record.id for record in asked_records(benchmark, "general", config)] == ["test0", "test4", "test8"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: not enough memory: you tried to allocate"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_a_batch_that_does_not_fit_into_memory_is_halved_once_and_answers_are_the_same(
    error, base, records, tmp_path, monkeypatch
):
    whole, sizes, warned = answers(base, records, tmp_path, 12), [], []

    def at_most_three(*given):
        sizes.append(len(given[2]))
        if sizes[-1] > 3:
            raise error
        return generate(*given)

    monkeypatch.setattr(harness, "generate", at_most_three)
    monkeypatch.setattr(harness.log, "warning", lambda *told: warned.append(told[0] % told[1:]))
    (tmp_path / "again").mkdir()
    assert answers(base, records, tmp_path / "again", 10) == whole
    assert sizes == [10, 5, 2, 2, 2, 2, 2, 2], "a smaller size is remembered"
    assert len(warned) == 1 and "at most 2 questions" in warned[0]


def test_a_question_that_alone_does_not_fit_is_told_in_a_sentence(base, records, tmp_path, monkeypatch):
    def none(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(harness, "generate", none)
    with pytest.raises(UserError, match=r"one question alone does not fit into memory .* eval.max_new_tokens"):
        answers(base, records, tmp_path, 4)


def test_other_errors_are_no_reason_to_halve_a_batch(base, records, tmp_path, monkeypatch):
    def broken(*given):
        raise RuntimeError("made up")

    monkeypatch.setattr(harness, "generate", broken)
    with pytest.raises(RuntimeError, match="made up"):
        answers(base, records, tmp_path, 4)


def test_a_set_that_falls_by_more_than_it_may_is_named_with_both_scores():
    rows = {"base": {"A": 80.0, "B": None}, "A": {"A": 90.0, "B": 10.0}, "B": {"B": 70.0}, "C": {"A": 30.0, "B": 20.0}}
    assert collapses(rows, 50.0) == ["A has collapsed: 90.0 after A, 30.0 after C"]
    assert collapses(rows, 49.0)[1] == "B has collapsed: 70.0 after B, 20.0 after C"
    assert collapses(rows, 60.0) == collapses(rows, None) == []
