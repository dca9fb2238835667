"""Gradient-aligned steps, as LoDA takes them: each half of a batch is learnt where a step along the other's leads.

theta are a branch's trained tensors, L_1 and L_2 the mean losses over the tokens of two halves of a batch, n_1 and n_2
of them, which have no answer in common. With rho = rho_max U(0, 1), drawn for each step, and tensor by tensor

    e_i = -rho g_i / (|g_i| + 1e-12),  g_i the gradient of L_i at theta
    g <- (n_1 grad L_1(theta + e_2) + n_2 grad L_2(theta + e_1)) / (n_1 + n_2)

To first order that descends on L and rewards agreement of g_1 and g_2. A batch with one answer has its own gradient.
Source: LoDA (ICML 2026, arXiv 2603.00191), its code, where halves are of classes. Departures: they are of answers, or
of single records (`random`), told apart by text and, where each has one, picture. A batch is one optimizer step, from
both gradients at once; the code makes one for each half, the second from where the first ended. Dropout is off.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mllm_keeplora.models import IGNORED
from mllm_keeplora.strategies.base import Context, Step

if TYPE_CHECKING:
    from torch import Tensor

Partition = Literal["answer", "random"]
HELD = 4  # tensors as large as what trains that are alive: both slopes, the sum, and where the step began


def replace_gradients(
    context: Context, batches: Sequence[dict[str, Any]], step: Step, rho_max: float, partition: Partition
) -> None:
    """Replace what is to be stepped along by the aligned gradient, which is the same in all processes.

    Args:
        context: of a training.
        batches: this process's micro-batches of the step.
        step: of the training, for what is drawn.
        rho_max: longest step ahead, in the norm of a tensor.
        partition: what halves do not have in common.
    """
    import torch

    rng = random.Random(f"{step.seed} {step.number}")
    halves = _halves(context, batches, rng, partition)
    if halves is None:
        return
    trained, rho = context.branches.trainable(), rho_max * rng.random()
    moved = {name: each for name, each in trained.items() if not context.branches.is_full(name)}
    start = {name: parameter.detach().clone() for name, parameter in moved.items()}
    slopes = [context.passes.mean_gradients(half)[0] for half in halves]
    total, count = {}, 0
    for half, slope in zip(halves, reversed(slopes), strict=True):
        with torch.no_grad():
            for name, parameter in moved.items():
                parameter.sub_(rho / (slope[name].norm() + 1e-12) * slope[name])
        ahead, tokens = context.passes.mean_gradients(half)
        with torch.no_grad():
            for name, parameter in moved.items():
                parameter.copy_(start[name])
        total = {name: total.get(name, 0.0) + tokens * each for name, each in ahead.items()}
        count += tokens
    for name, parameter in trained.items():
        parameter.grad = (total[name] / count).to(parameter.dtype)


def classes_of(batch: Mapping[str, Tensor], partition: Partition) -> Tensor:
    """Give each row the number of its class, the same whatever it is batched with; 0 where nothing carries loss.

    A class is an answer, of a dual encoder the text of the row's class; or a record, by its text and its picture.
    """
    import torch

    labels, texts, mask = batch["labels"].cpu(), batch["input_ids"].cpu(), batch.get("attention_mask")
    mask = torch.ones_like(texts) if mask is None else mask.cpu()
    pictures = batch.get("pixel_values") if partition == "random" else None
    if pictures is not None and len(pictures) != len(labels):  # whose each is, the batch does not tell
        pictures = None
    found = []
    for row, own in enumerate(labels):
        carrying, place = own[own != IGNORED], int(own) if labels.ndim == 1 else row
        if not len(carrying):
            found.append(0)
            continue
        of_text = labels.ndim == 1 or partition == "random"
        told = str((texts[place][mask[place] > 0] if of_text else carrying).tolist()).encode()
        if pictures is not None:
            told += pictures[row].float().cpu().numpy().tobytes()
        found.append(1 + int.from_bytes(hashlib.sha256(told).digest()[:7], "big"))
    return torch.tensor(found, dtype=torch.int64)


def _halves(
    context: Context, batches: Sequence[dict[str, Any]], rng: random.Random, partition: Partition
) -> list[list[dict[str, Any]]] | None:
    """Split a step's micro-batches by classes of all processes' rows; None where there is one class."""
    import torch

    own = [classes_of(batch, partition) for batch in batches]
    joined = torch.cat([torch.zeros(0, dtype=torch.int64), *own])
    classes = sorted(set(context.processes.gathered(joined).tolist()) - {0})
    rng.shuffle(classes)
    middle = len(classes) // 2
    if not middle:
        return None
    halves: list[list[dict[str, Any]]] = []
    for side in (classes[:middle], classes[middle:]):
        chosen = [torch.isin(each, torch.tensor(side)) for each in own]
        halves.append([_only(batch, rows) for batch, rows in zip(batches, chosen, strict=True) if rows.any()])
    return halves


def _only(batch: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The same batch with what carries loss in some rows alone."""
    labels = batch["labels"]
    rows = rows.to(labels.device).reshape(-1, *[1] * (labels.ndim - 1))
    return {**batch, "labels": labels.masked_fill(~rows, IGNORED)}
