"""Ask a model the questions of a test set: batched, left-padded, greedy, sharded over processes, resumable.

Questions are answered in batches of a fixed plan (sorted by length). Finished batches are kept in a journal, so an
interrupted evaluation asks nothing twice and ends with the same file: re-batching would change padding, and so answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm_keeplora import distributed, files
from mllm_keeplora.data import Record, TestSet
from mllm_keeplora.data.collate import batches
from mllm_keeplora.data.images import images_of
from mllm_keeplora.metrics import score
from mllm_keeplora.models import Base
from mllm_keeplora.progress import progress_bar


@dataclass(frozen=True)
class Question:
    """One test record with its place in the file."""

    index: int
    record: Record


def evaluate_set(
    base: Base,
    model: Any,
    records: Sequence[Record],
    part: TestSet,
    predictions: Path,
    title: str,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> float:
    """Answer and score every record; write the predictions file and return the mean score in percent.

    Args:
        base: gives prompt and processor.
        model: what answers; `base.model` or its wrapped form.
        records: test records, in the order of the predictions file.
        part: scorer, prompt suffix and answer length of this set.
        predictions: JSON lines of id, question, answer, prediction, score; written whole, at the end.
        title: shown beside the progress bar.
        batch_size: questions per forward and process.
        max_new_tokens: overrides the set's own.
    """
    plan = _plan(base, records, batch_size)
    tokens = max_new_tokens or part.max_new_tokens
    identity = _identity(records, part, batch_size, tokens)
    journal = Journal(predictions.with_name(f"{predictions.name}.rank{distributed.rank()}.part"), identity)
    own = range(distributed.rank(), len(plan), distributed.world_size())
    with progress_bar(title, sum(len(plan[number]) for number in own)) as advance:
        for number in own:
            if number not in journal.answers:
                texts = generate(base, model, [q.record for q in plan[number]], part.prompt_suffix, tokens)
                journal.add(number, {q.index: text for q, text in zip(plan[number], texts, strict=True)})
            advance(len(plan[number]))
    answered = {int(i): text for share in distributed.gather(journal.texts()) for i, text in share.items()}
    rows = [_row(record, answered[index], part) for index, record in enumerate(records)]
    if distributed.is_main():
        files.write_json_lines(predictions, rows)
    distributed.barrier()
    journal.remove()
    return mean_score(rows)


def generate(base: Base, model: Any, records: Sequence[Record], suffix: str, max_new_tokens: int) -> list[str]:
    """Greedy answers to one batch of questions."""
    import torch

    parameter = next(base.model.parameters())
    batch = base.prompt.question_batch(records, [images_of(record) for record in records], suffix)
    batch = {key: _to(value, parameter) for key, value in batch.items()}
    with torch.inference_mode():
        tokens = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=base.prompt.tokenizer.pad_token_id,
        )
    return base.prompt.answers(tokens, batch["input_ids"].shape[1])


def mean_score(rows: Sequence[dict]) -> float:
    """Mean score in percent."""
    return 100.0 * sum(row["score"] for row in rows) / len(rows)


class Journal:
    """Answers of finished batches, one JSON line each behind a first line that says what is being asked."""

    def __init__(self, path: Path, identity: str):
        self.path = path
        self.answers: dict[int, dict[str, str]] = {}
        lines = files.read_lines(path) if path.is_file() else []
        if lines and lines[0] == identity:
            for line in lines[1:]:
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line that a killed process did not finish
                self.answers[entry["batch"]] = entry["answers"]
        whole = [identity, *(self._line(number) for number in self.answers)]
        files.write_text(path, "\n".join(whole) + "\n")

    def add(self, number: int, answers: dict[int, str]) -> None:
        self.answers[number] = {str(index): text for index, text in answers.items()}
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(self._line(number) + "\n")

    def texts(self) -> dict[str, str]:
        return {index: text for answers in self.answers.values() for index, text in answers.items()}

    def remove(self) -> None:
        self.path.unlink()

    def _line(self, number: int) -> str:
        return json.dumps({"batch": number, "answers": self.answers[number]}, ensure_ascii=False)


def _plan(base: Base, records: Sequence[Record], batch_size: int) -> list[list[Question]]:
    questions = [Question(index, record) for index, record in enumerate(records)]
    questions.sort(key=lambda question: (base.prompt.length(question.record), question.index))
    return [list(batch) for batch in batches(questions, batch_size)]


def _identity(records: Sequence[Record], part: TestSet, batch_size: int, max_new_tokens: int) -> str:
    asked = hashlib.sha256("\0".join(f"{r.id}\1{r.question}" for r in records).encode()).hexdigest()[:16]
    return json.dumps([asked, part.prompt_suffix, batch_size, max_new_tokens, distributed.world_size()])


def _row(record: Record, prediction: str, part: TestSet) -> dict:
    image = record.media[0].path.name if record.media else ""
    value = score(part.scorer, prediction=prediction, answer=record.answer, question=record.question, image=image)
    return {
        "id": record.id,
        "question": record.question,
        "answer": record.answer,
        "prediction": prediction,
        "score": value,
    }


def _to(value: Any, parameter: Any) -> Any:
    """Onto the model's device; floating inputs (pixel values) to its dtype."""
    return value.to(parameter.device, parameter.dtype) if value.is_floating_point() else value.to(parameter.device)
