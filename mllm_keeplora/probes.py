"""Stream what passes through target layers into `linalg` accumulators: features going in, gradients coming out.

Hooks live only inside the functions here; they are removed and the model's mode restored when anything raises. No
parameter ever requires a gradient, so quantised and partitioned weights work and no `.grad` of a base weight exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from mllm_keeplora import distributed, hooks
from mllm_keeplora.hooks import evaluating, graph_from_inputs, removed_afterwards
from mllm_keeplora.plans import EXACT_FEATURES, EXACT_GRADIENTS, FeaturePlan, GradientPlan
from mllm_keeplora.tokens import IGNORED, ChosenRows, as_rows, supervised_positions

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.linalg import FrequentDirections, GradientAccumulator, GradientSketch, MomentAccumulator


def collect_moments(
    model: Any, layers: dict[str, Any], batches: Iterable[dict], plan: FeaturePlan = EXACT_FEATURES
) -> dict[str, MomentAccumulator | FrequentDirections]:
    """Statistics of every target layer's input features over real tokens; padding never counts.

    Args:
        model: what runs, with whatever branches are active.
        layers: name of each target layer -> its module within `model`.
        batches: model inputs; `labels` are needed only where `plan.tokens` tells answers from instructions.
        plan: exact moments or sketches, and which tokens.

    Returns:
        Target layer -> moments, or a sketch of them. Layers that are fed the very same tensor (q, k, v; gate, up)
        share one object.

    Raises:
        ValueError: a feature is not finite; the message names the layer.
    """
    import torch

    moments: dict[str, MomentAccumulator | FrequentDirections] = {}
    batches = iter(batches)
    first = next(batches, None)  # the main process has one, whatever the others have
    exact = distributed.from_main(first is not None and _features_exactly(model, layers, first, plan))
    make = partial(plan.accumulator, exact=exact)
    for batch in chain(() if first is None else (first,), batches):
        inputs_only = {key: value for key, value in batch.items() if key != "labels"}
        rows = ChosenRows(batch, plan, getattr(model.config, "image_token_id", None))
        with _input_hooks(layers, moments, rows, make), torch.no_grad(), evaluating(model), hooks.without_logits(model):
            model(**inputs_only)
    groups = distributed.from_main(_sharing(moments))  # a process without records learns here who shares an input
    _refuse_missing(layers, [name for group in groups for name in group], "saw no input")
    for group in groups:
        layer = layers[group[0]]
        shared = moments.get(group[0]) or make(layer.in_features, device=layer.weight.device)
        moments.update(dict.fromkeys(group, _over_processes(shared)))
    return {name: moments[name] for name in layers}


def collect_mean_gradients(
    model: Any, layers: dict[str, Any], batches: Iterable[dict], plan: GradientPlan = EXACT_GRADIENTS
) -> dict[str, GradientAccumulator | GradientSketch]:
    """Mean gradient of the loss with respect to every target weight, from inputs and output gradients.

    The loss of a sample is the mean over its answer tokens, and the gradient is the mean over samples, whatever the
    batches: the same as passes of batch size 1.

    Args:
        model, layers: as in `collect_moments`.
        batches: model inputs with `labels`.
        plan: exact sums or sketches.

    Raises:
        RuntimeError: a target layer received no gradient.
        ValueError: a gradient is not finite; the message names the layer.

    Source: KeepLoRA, Eq. (2); input side and output side as in torch's (d_out, d_in).
    """
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    device = next(iter(layers.values())).weight.device
    exact = distributed.from_main(plan.exact(sizes, device))
    guided = [name for name, (d_out, _) in sizes.items() if plan.guided and not exact and plan.width < d_out]
    along: dict[str, Tensor] = {}
    if guided and distributed.world_size() > 1:
        along, batches = _same_directions(model, layers, batches, plan, guided)
    gradients: dict[str, GradientAccumulator | GradientSketch] = {}

    def add(name: str, grad_output: Tensor, inputs: Tensor) -> None:
        if name not in gradients:
            if name in guided and name not in along:
                along[name] = plan.directions(grad_output, inputs)
            gradients[name] = plan.accumulator(*sizes[name], exact, device, along.pop(name, None))
        gradients[name].update(grad_output, inputs)

    for batch in batches:
        _backward(model, layers, batch, add)
        for accumulator in gradients.values():
            accumulator.count_samples(batch["labels"].shape[0])
    _refuse_missing(layers, distributed.from_main(list(gradients)), "received no gradient")
    for name in layers:
        if name not in gradients:
            gradients[name] = plan.accumulator(*sizes[name], exact, device, along.pop(name, None))
        distributed.all_reduce(gradients[name].tensors())
    return {name: gradients[name] for name in layers}


def shared_inputs(model: Any, layers: dict[str, Any], batch: dict) -> list[list[str]]:
    """Target layers grouped by the tensor that feeds them, seen in one forward of model inputs."""
    import torch

    seen: dict[int, list[str]] = {}
    tensors = []  # held until the end, so that no identity is reused

    def keep(name: str):
        def hook(module: Any, args: tuple) -> None:
            tensors.append(args[0])
            seen.setdefault(id(args[0]), []).append(name)

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    with removed_afterwards(handles), torch.no_grad(), evaluating(model), hooks.without_logits(model):
        model(**{key: value for key, value in batch.items() if key != "labels"})
    return list(seen.values())


def measure_inputs(
    model: Any,
    layers: dict[str, Any],
    batches: Iterable[dict],
    measure: Callable[[str], Callable[[Tensor, Tensor], Tensor]],
    lengths: dict[str, int],
) -> dict[str, Tensor]:
    """Sum a measure of every target layer's input and output rows over all real tokens and all processes.

    Args:
        model, layers: as in `collect_moments`.
        batches: model inputs without labels.
        measure: layer -> function of rows (n, d_in) and (n, d_out) to a float64 vector, which is summed.
        lengths: layer -> length of that vector (a process without records needs it).

    Returns:
        Target layer -> (length,) float64 on the CPU.
    """
    import torch

    sums = {name: torch.zeros(lengths[name], dtype=torch.float64) for name in layers}
    functions = {name: measure(name) for name in layers}
    for batch in batches:
        rows = ChosenRows(batch, EXACT_FEATURES, None)

        def keep(name: str, rows: ChosenRows = rows):
            def hook(module: Any, args: tuple, output: Tensor) -> None:
                sums[name] += functions[name](rows.of(args[0].detach()), rows.of(output.detach())).cpu()

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
        with removed_afterwards(handles), torch.no_grad(), evaluating(model), hooks.without_logits(model):
            model(**batch)
    distributed.all_reduce(sums.values())
    return sums


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Next-token cross entropy of every supervised token.

    Args:
        logits: (b, t, vocabulary), or (1, n, vocabulary) at the supervised positions alone (`supervised_logits`).
        labels: (b, t) token ids, -100 where there is no loss.

    Returns:
        (n,) float32, row by row.
    """
    import torch.nn.functional as F

    rows, positions = supervised_positions(labels)
    chosen = logits[rows, positions] if logits.shape[:2] == labels.shape else logits.flatten(0, 1)  # a view both ways
    return F.cross_entropy(chosen.float(), labels[rows, positions + 1], reduction="none")


def per_sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of `token_losses` over each sample's supervised tokens: (b,) float32."""
    losses, rows = token_losses(logits, labels), supervised_positions(labels)[0]
    counts = (labels[:, 1:] != IGNORED).sum(dim=1)
    return losses.new_zeros(labels.shape[0]).index_add(0, rows, losses) / counts


@contextmanager
def _input_hooks(layers: dict[str, Any], into: dict[str, Any], rows: ChosenRows, make: Callable) -> Iterator[None]:
    """Add every layer's input rows to its accumulator; the same tensor object is added once for all who receive it."""
    latest: list[tuple[Any, Any]] = []  # holds the tensor itself, so that identity cannot be reused

    def keep(name: str):
        def hook(module: Any, args: tuple) -> None:
            shared = next((accumulator for tensor, accumulator in latest if tensor is args[0]), None)
            if shared is not None:
                assert into.setdefault(name, shared) is shared, f"{name} no longer shares its input"
                return
            if name not in into:
                into[name] = make(args[0].shape[-1], device=args[0].device)
            accumulator = into[name]
            _named(name, accumulator.update, rows.of(args[0].detach()))
            latest[:] = [*latest[-1:], (args[0], accumulator)]

        return hook

    with removed_afterwards([module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]):
        yield


def _backward(model: Any, layers: dict[str, Any], batch: dict, add: Callable[[str, Tensor, Tensor], None]) -> None:
    """One pass of a batch; while it runs backward, `add` gets name, output gradients and inputs of every layer."""

    def keep(name: str):
        def hook(module: Any, args: tuple, output: Tensor) -> None:
            rows = as_rows(args[0].detach())
            output.register_hook(lambda gradient: _named(name, partial(add, name), as_rows(gradient), rows))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with removed_afterwards(handles), graph_from_inputs(model), evaluating(model):
        with hooks.supervised_logits(model, batch["labels"]):
            loss = per_sample_loss(model(**inputs).logits, batch["labels"]).sum()  # no name keeps the logits alive
        loss.backward()


def _same_directions(
    model: Any, layers: dict[str, Any], batches: Iterable[dict], plan: GradientPlan, guided: list[str]
) -> tuple[dict[str, Tensor], Iterable[dict]]:
    """What to sketch along on all processes: from the main one's first batch; and the batches, that one included."""
    import torch

    batches = iter(batches)
    first = next(batches, None)
    found: dict[str, Tensor] = {}

    def look(name: str, grad_output: Tensor, inputs: Tensor) -> None:
        if name in guided and name not in found:
            found[name] = plan.directions(grad_output, inputs)

    if distributed.is_main() and first is not None:
        _backward(model, layers, first, look)
    for name in guided:
        if name not in found:
            found[name] = torch.zeros(layers[name].out_features, plan.width, device=layers[name].weight.device)
        distributed.all_reduce([found[name]])
    return found, batches if first is None else chain([first], batches)


def _features_exactly(model: Any, layers: dict[str, Any], batch: dict, plan: FeaturePlan) -> bool:
    groups = shared_inputs(model, layers, batch) if plan.statistic == "auto" else []
    widths = [layers[group[0]].in_features for group in groups]
    return plan.exact(widths, next(iter(layers.values())).weight.device)


def _over_processes(statistic: Any) -> Any:
    """Sum over processes; sketches, which are not linear, are gathered and merged in rank order."""
    from mllm_keeplora.linalg import FrequentDirections

    if not isinstance(statistic, FrequentDirections):
        distributed.all_reduce(statistic.tensors())
        return statistic
    first, *others = distributed.gather(statistic)
    for other in others:
        first.merge(other)
    return first


def _named(name: str, update: Any, *rows: Tensor) -> None:
    try:
        update(*rows)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None


def _sharing(moments: dict[str, Any]) -> list[list[str]]:
    """Names of layers by the accumulator that they share."""
    groups: dict[int, list[str]] = {}
    for name, accumulator in moments.items():
        groups.setdefault(id(accumulator), []).append(name)
    return list(groups.values())


def _refuse_missing(layers: dict[str, Any], reached: list[str], what: str) -> None:
    missing = sorted(layers.keys() - set(reached))
    if missing:
        raise RuntimeError(f"{len(missing)} target layers {what}, first {missing[0]}")
