"""Ask a model the questions of a test set: batched, left-padded, greedy, sharded over processes, resumable.

Questions are answered in batches of a fixed plan (sorted by length). Finished batches are kept in a journal, so an
interrupted evaluation asks nothing twice and ends with the same file: re-batching would change padding, and so answers.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mllm_keeplora.adapters.mixers.mixing import keep_rows, look_at
from mllm_keeplora.config import EvalConfig
from mllm_keeplora.data import Record, TestSet
from mllm_keeplora.data.media.video import decoder_versions
from mllm_keeplora.errors import UserError, first_line, is_out_of_memory
from mllm_keeplora.eval.grading import SUBMISSION, write_graded
from mllm_keeplora.models import Base
from mllm_keeplora.models.family import Answer
from mllm_keeplora.models.partition import keeps_step
from mllm_keeplora.runs import DomainDir
from mllm_keeplora.system import distributed, files, given
from mllm_keeplora.system.distributed import free_cached_memory
from mllm_keeplora.system.log import log
from mllm_keeplora.system.progress import progress_bar

SMALLER = "give a smaller eval.max_new_tokens, smaller pictures, or base.quantization"


def evaluate_set(
    base: Base,
    model: Any,
    records: Sequence[Record],
    part: TestSet,
    predictions: Path,
    settings: EvalConfig,
    asked_of: str = "",
    keep_journal: bool = False,
) -> float | None:
    """Answer and score every record; write the predictions file and return the score in percent.

    Args:
        base: gives prompt and processor.
        model: what answers; `base.model` or its wrapped form.
        records: test records, in the order of the predictions file.
        part: scorer, prompt suffix and answer length of this set.
        predictions: JSON lines as `grading.write_graded` makes them; written whole, at the end.
        settings: questions per forward and process, an answer length instead of the set's own, `settle_ties`.
        asked_of: names the model, where one folder may be used for several: answers of another are not taken over.
        keep_journal: leave the answers for a caller that has more sets to ask; `forget_journals` removes them.

    Returns:
        None where the set cannot be graded here; what to hand in elsewhere is then beside the predictions.
    """
    plan = _plan(base, records, settings.batch_size)
    tokens = settings.max_new_tokens or part.max_new_tokens
    how = [settings.batch_size, tokens, settings.settle_ties, asked_of]
    identity = _identity(base, records, part, how if settings.prompts == "first" else [*how, settings.prompts])
    # Each process answers its batches, but for those that its journal has.
    journal = Journal(predictions.with_name(f"{predictions.name}.rank{distributed.rank()}.part"), identity)
    own = range(distributed.rank(), len(plan), distributed.world_size())
    left = [number for number in own if number not in journal.answers]
    # Where processes answer in step, all run as many batches as the one with most left; the added ones are not kept.
    idle = max(distributed.gather(len(left))) - len(left) if keeps_step(model) else 0
    title, most = f"{predictions.parent.parent.name}: {predictions.stem}", settings.batch_size
    length, asking = sum(len(plan[number]) for number in own), base.family.asking(settings.prompts == "ensemble")
    with progress_bar(title, length) as advance, asking:
        advance(sum(len(plan[number]) for number in own if number not in left))
        for number in left + [None] * idle:
            batch = [records[index] for index in plan[number or 0]]
            suffixes = [part.suffix_for(record) for record in batch]

            def ask(some: slice, batch=batch, suffixes=suffixes) -> list[Answer]:
                return generate(base, model, batch[some], suffixes[some], tokens, settings.settle_ties)

            if keeps_step(model):  # what one process divided, the others would have to divide, too
                answers = ask(slice(None))
            else:
                answers, most = asked_in_parts(ask, len(batch), most, title)
            if number is not None:
                journal.add(number, dict(zip(plan[number], answers, strict=True)))
                advance(len(plan[number]))
    # The shares of all processes, in the order of the records.
    answered = {index: answer for share in distributed.gather(journal.by_index()) for index, answer in share.items()}
    answers = [answered[index] for index in range(len(records))]
    dtype = str(next(base.model.parameters()).dtype).removeprefix("torch.")
    how = {"batch_size": settings.batch_size, "max_new_tokens": tokens, "dtype": dtype}
    percent = write_graded(predictions, part, records, answers, how)
    if percent is None and distributed.is_main():  # lines as the official runners write them
        submission = [
            {"question_id": record.id, "prompt": record.question + part.suffix_for(record), "text": answer.text}
            for record, answer in zip(records, answers, strict=True)
        ]
        files.write_json_lines(predictions.with_suffix(SUBMISSION), submission)
    distributed.barrier()
    if not keep_journal:
        journal.path.unlink()
    return percent


def asked_in_parts(ask: Callable[[slice], list[Answer]], count: int, most: int, title: str) -> tuple[list[Answer], int]:
    """Ask a batch of questions in as many parts as memory makes necessary; answers do not depend on them.

    Args:
        ask: gives the answers to some of the batch.
        count: questions of the batch.
        most: questions at once that are known to fit, or hoped to.
        title: of the set, for the warning.

    Returns:
        The answers, and how many questions to ask at once from here on: half as many whenever they did not fit.

    Raises:
        UserError: one question alone does not fit.
    """
    answers: list[Answer] = []
    halved = False
    while len(answers) < count:
        size = min(most, count - len(answers))
        said = ""
        try:
            answers += ask(slice(len(answers), len(answers) + size))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = first_line(error)  # the error itself holds what is to be freed
        if said and size == 1:
            raise UserError(f"{title}: one question alone does not fit into memory ({said}); {SMALLER}")
        if said:
            most, halved = size // 2, True
            free_cached_memory()
    if halved:
        log.warning("%s: out of memory; from here on at most %d questions are asked at once", title, most)
    return answers, most


def forget_journals(folder: DomainDir, names: Sequence[str]) -> None:
    """Remove the journals of sets that are answered and graded, also those of processes that no longer take part."""
    distributed.barrier()
    if distributed.is_main():
        for name in names:
            for path in folder.predictions(name).parent.glob(f"{glob.escape(name)}.jsonl.rank*.part"):
                path.unlink()


def generate(
    base: Base,
    model: Any,
    records: Sequence[Record],
    suffixes: Sequence[str],
    max_new_tokens: int,
    settle_ties: bool = True,
) -> list[Answer]:
    """Give greedy answers to one batch of questions, each with a suffix appended.

    Where the likeliest of two tokens is a matter of rounding, and so of the other rows, `settle_ties` asks the question
    again alone, so that neither the size of batches nor the number of processes tips it. Processes that must answer in
    step leave it at the batch's answer.
    """
    import torch

    def answered(rows: Sequence[int]) -> list[Answer]:
        parameter = next(base.model.parameters())
        batch = base.family.question_batch([records[row] for row in rows], [suffixes[row] for row in rows])
        dtypes = {True: parameter.dtype, False: None}  # pixel values take the model's
        batch = {key: value.to(parameter.device, dtypes[value.is_floating_point()]) for key, value in batch.items()}
        with torch.inference_mode():
            look_at(base.model, batch)
            return base.family.answers(model, batch, max_new_tokens, keep_rows(base.model))

    answers = answered(range(len(records)))
    if settle_ties and len(records) > 1 and not keeps_step(model):
        for row in [row for row, answer in enumerate(answers) if answer.is_close]:
            [answers[row]] = answered([row])
    return answers


class Journal:
    """A file of finished batches: one JSON line each, behind a first line that says what is being asked."""

    def __init__(self, path: Path, identity: str):
        self.path = path
        self.answers: dict[int, dict[str, list]] = {}
        lines = files.read_lines(path) if path.is_file() else []
        if lines and lines[0] == identity:
            for line in lines[1:]:
                try:
                    entry = given.from_json(line)
                    self.answers[int(entry["batch"])] = dict(entry["answers"])
                except (ValueError, TypeError, KeyError):
                    break  # the line that a killed process did not finish
        whole = [identity, *(self._line(number) for number in self.answers)]
        files.write_text(path, "\n".join(whole) + "\n")

    def add(self, number: int, answers: dict[int, Answer]) -> None:
        self.answers[number] = {str(index): _told(answer) for index, answer in answers.items()}
        files.append_line(self.path, self._line(number))

    def by_index(self) -> dict[int, Answer]:
        return {int(index): Answer(*told) for answers in self.answers.values() for index, told in answers.items()}

    def _line(self, number: int) -> str:
        return json.dumps({"batch": number, "answers": self.answers[number]})  # ASCII: a cut line can still be read


def _told(answer: Answer) -> list:
    """Fields of an answer, those that it has; a near tie is settled."""
    chosen = [] if answer.probability is None else [False, answer.probability, answer.second]
    return [answer.text, answer.is_cut, *chosen]


def _plan(base: Base, records: Sequence[Record], batch_size: int) -> list[list[int]]:
    """Put the records' places into batches of questions of about one length; several processes get as many each."""
    lengths = [base.family.length(record) for record in records]
    order = sorted(range(len(records)), key=lambda index: (lengths[index], index))
    world = distributed.world_size()
    if world > 1:
        rounds = math.ceil(len(order) / (batch_size * world))
        batch_size = math.ceil(len(order) / (rounds * world))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _identity(base: Base, records: Sequence[Record], part: TestSet, asked_how: list) -> str:
    """Tell what makes answers the same: questions as they are put, pictures, batches, precision, device, the model."""
    asked = hashlib.sha256()
    for record in records:
        asked.update(f"{record.id}\0{record.turns}\0{part.suffix_for(record)}".encode())
        if record.classes is not None:
            asked.update(record.classes.digest.encode())
        for media in record.media:
            asked.update(f"{media.path}\0{media.pad}".encode() + hashlib.sha1(media.data or b"").digest())
            if media.type == "video":
                clip = (
                    media.start,
                    media.end,
                    media.files,
                    media.video,
                    base.family.prompt.is_native,
                    decoder_versions(),
                )
                asked.update("\0".join(map(str, clip)).encode())
    parameter = next(base.model.parameters())
    here = [str(parameter.dtype), parameter.device.type, distributed.world_size()]
    return json.dumps([asked.hexdigest()[:16], *asked_how, *here])
