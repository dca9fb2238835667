"""Mean gradients of target weights, from what goes into a layer and the gradient that comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.family import inputs_of, mean_by_row
from mllm_keeplora.models.partition import IdleBatch, streamed
from mllm_keeplora.models.running import evaluating, removed_afterwards
from mllm_keeplora.probes.passes import counted, named, over_processes, refuse_missing
from mllm_keeplora.probes.plans import EXACT_GRADIENTS, GradientPlan
from mllm_keeplora.probes.rows import as_rows
from mllm_keeplora.system import distributed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mllm_keeplora.models.family import Family
    from mllm_keeplora.probes.plans import Gradients


def collect_mean_gradients(
    family: Family,
    model: Any,
    layers: dict[str, Any],
    batches: Iterable[dict],
    plan: GradientPlan = EXACT_GRADIENTS,
    passed_over: Collection[str] = (),
) -> Gradients:
    """Collect the mean gradient of the loss with respect to every target weight, from inputs and output gradients.

    The loss of a sample is the mean over its answer tokens, and the gradient is the mean over samples, whatever the
    batches: the same as passes of batch size 1.

    Args:
        family, model, layers: as in `collect_moments`.
        batches: model inputs with `labels`.
        plan: exact sums or sketches.
        passed_over: layers whose gradient may be zero since nothing reaches them, as in `collect_moments`.

    Raises:
        RuntimeError: another layer received no gradient.
        ValueError: a gradient is not finite; the message names the layer.

    Source: KeepLoRA, Eq. (2); input side and output side as in torch's (d_out, d_in).
    """
    import torch

    sizes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    device = next(iter(layers.values())).weight.device
    exact = distributed.from_main(plan.exact(sizes))
    gradients = {name: plan.accumulator(*size, exact, device) for name, size in sizes.items()}
    waiting_in = torch.bfloat16 if plan.following and not exact else None  # half the memory where sums are not exact
    reached: set[str] = set()

    def add(name: str, grad_output: Tensor, inputs: Tensor) -> None:
        reached.add(name)
        gradients[name].update(grad_output, inputs)

    for batch in batches:
        _backward(family, model, counted(layers, batch), batch, add, waiting_in)
        for accumulator in () if isinstance(batch, IdleBatch) else gradients.values():
            accumulator.count_samples(batch["labels"].shape[0])
    by_any = {name for share in distributed.gather(sorted(reached)) for name in share}
    refuse_missing(layers.keys() - by_any - {*passed_over}, "received no gradient")
    return {name: over_processes(each) for name, each in gradients.items()}


def _backward(
    family: Family,
    model: Any,
    layers: dict[str, Any],
    batch: dict,
    add: Callable[[str, Tensor, Tensor], None],
    waiting_in: torch.dtype | None,
) -> None:
    """Run a batch forward and backward; `add` gets name, output gradients and inputs of every layer.

    Inputs wait for their gradients; in the dtype `waiting_in`, where it is given. Layers with one input share it.
    """
    latest: list[tuple[Any, Tensor]] = []  # holds the tensor itself, so that identity cannot be reused

    def keep(name: str, module: Any, args: tuple, output: Tensor) -> None:
        rows = next((rows for tensor, rows in latest if tensor is args[0]), None)
        if rows is None:
            rows = as_rows(args[0].detach()).to(waiting_in)
            latest[:] = [*latest[-1:], (args[0], rows)]
        output.register_hook(lambda gradient: named(name, partial(add, name), as_rows(gradient), rows))

    handles = [module.register_forward_hook(partial(keep, name)) for name, module in layers.items()]
    labels, prepared = batch["labels"], family.passing(model, gradients=True)
    with removed_afterwards(handles), prepared, evaluating(model), streamed(model):
        with family.supervised(model, batch):  # no name keeps the logits alive
            losses, rows = family.losses(model(**inputs_of(batch)).logits, labels)
        mean_by_row(losses, rows, len(labels)).sum().backward()
