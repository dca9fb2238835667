"""Stream what passes through target layers into `linalg` accumulators: features going in, gradients coming out.

Hooks live only inside the functions here; they are removed and the model's mode restored when anything raises. No
parameter ever requires a gradient, so quantised and partitioned weights work and no `.grad` of a base weight exists.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models import running as hooks
from mllm_keeplora.models.causal.logits import graph_from_inputs
from mllm_keeplora.models.causal.losses import per_sample_loss
from mllm_keeplora.models.partition import IdleBatch, streamed
from mllm_keeplora.models.running import evaluating, removed_afterwards
from mllm_keeplora.plans import EXACT_FEATURES, EXACT_GRADIENTS, FeaturePlan, GradientPlan
from mllm_keeplora.system import distributed
from mllm_keeplora.tokens import ChosenRows, as_rows

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.linalg import FrequentDirections, GradientAccumulator, GradientSketch, MomentAccumulator


def collect_moments(
    model: Any,
    layers: dict[str, Any],
    batches: Iterable[dict],
    plan: FeaturePlan = EXACT_FEATURES,
    passed_over: Collection[str] = (),
) -> dict[str, MomentAccumulator | FrequentDirections]:
    """Statistics of every target layer's input features over real tokens; padding never counts.

    Args:
        model: what runs, with whatever branches are active.
        layers: name of each target layer -> its module within `model`.
        batches: model inputs; `labels` are needed only where `plan.tokens` tells answers from instructions.
        plan: exact moments or sketches, and which tokens.
        passed_over: layers that may see nothing at all, as a projector's where no record has a picture.

    Returns:
        Target layer -> moments, or a sketch of them. Layers that are fed the very same tensor (q, k, v; gate, up)
        share one object.

    Raises:
        RuntimeError: another layer saw no input.
        ValueError: a feature is not finite; the message names the layer.
    """

    moments: dict[str, MomentAccumulator | FrequentDirections] = {}
    batches = iter(batches)
    first = next(batches, None)  # the main process has one, whatever the others have
    exact = distributed.from_main(first is not None and _features_exactly(model, layers, first, plan))
    make = partial(plan.accumulator, exact=exact)
    for batch in chain(() if first is None else (first,), batches):
        inputs_only = {key: value for key, value in batch.items() if key != "labels"}
        rows = ChosenRows(batch, plan, getattr(model.config, "image_token_id", None))
        with _input_hooks(_counted(layers, batch), moments, rows, make), _looking(model):
            model(**inputs_only)
    groups = {tuple(group): None for share in distributed.gather(_sharing(moments)) for group in share}
    seen = {name for group in groups for name in group}  # by any process: one may be without records, or pictures
    _refuse_missing(layers.keys() - seen - {*passed_over}, "saw no input")
    for group in [*groups, *((name,) for name in layers if name not in seen)]:
        layer = layers[group[0]]
        shared = moments.get(group[0]) or make(layer.in_features, device=layer.weight.device)
        moments.update(dict.fromkeys(group, _over_processes(shared)))
    return {name: moments[name] for name in layers}


def collect_mean_gradients(
    model: Any,
    layers: dict[str, Any],
    batches: Iterable[dict],
    plan: GradientPlan = EXACT_GRADIENTS,
    passed_over: Collection[str] = (),
) -> dict[str, GradientAccumulator | GradientSketch]:
    """Mean gradient of the loss with respect to every target weight, from inputs and output gradients.

    The loss of a sample is the mean over its answer tokens, and the gradient is the mean over samples, whatever the
    batches: the same as passes of batch size 1.

    Args:
        model, layers: as in `collect_moments`.
        batches: model inputs with `labels`.
        plan: exact sums or sketches.
        passed_over: layers whose gradient may be zero since nothing reaches them, as in `collect_moments`.

    Raises:
        RuntimeError: another layer received no gradient.
        ValueError: a gradient is not finite; the message names the layer.

    Source: KeepLoRA, Eq. (2); input side and output side as in torch's (d_out, d_in).
    """
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    device = next(iter(layers.values())).weight.device
    exact = distributed.from_main(plan.exact(sizes))
    gradients = {name: plan.accumulator(*size, exact, device) for name, size in sizes.items()}
    reached: set[str] = set()

    def add(name: str, grad_output: Tensor, inputs: Tensor) -> None:
        reached.add(name)
        gradients[name].update(grad_output, inputs)

    for batch in batches:
        _backward(model, _counted(layers, batch), batch, add, plan.inputs_dtype(exact))
        for accumulator in () if isinstance(batch, IdleBatch) else gradients.values():
            accumulator.count_samples(batch["labels"].shape[0])
    by_any = {name for share in distributed.gather(sorted(reached)) for name in share}
    _refuse_missing(layers.keys() - by_any - {*passed_over}, "received no gradient")
    return {name: _over_processes(each) for name, each in gradients.items()}


def shared_inputs(model: Any, layers: dict[str, Any], batch: dict) -> list[list[str]]:
    """Target layers grouped by the tensor that feeds them, seen in one forward of model inputs."""

    seen: dict[int, list[str]] = {}
    tensors = []  # held until the end, so that no identity is reused

    def keep(name: str):
        def hook(module: Any, args: tuple) -> None:
            tensors.append(args[0])
            seen.setdefault(id(args[0]), []).append(name)

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    with removed_afterwards(handles), _looking(model):
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
        batches: model inputs.
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

        handles = [module.register_forward_hook(keep(name)) for name, module in _counted(layers, batch).items()]
        with removed_afterwards(handles), _looking(model):
            model(**{key: value for key, value in batch.items() if key != "labels"})
    distributed.all_reduce(sums.values())
    return sums


@contextmanager
def _looking(model: Any) -> Iterator[None]:
    """For a forward pass that is there for its layers' inputs alone."""
    import torch

    with torch.no_grad(), evaluating(model), hooks.without_logits(model), streamed(model):
        yield


def _counted(layers: dict[str, Any], batch: dict) -> dict[str, Any]:
    """The layers whose statistics a batch goes into."""
    return {} if isinstance(batch, IdleBatch) else layers


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


def _backward(
    model: Any, layers: dict[str, Any], batch: dict, add: Callable[[str, Tensor, Tensor], None], kept_in: Any = None
) -> None:
    """One pass of a batch; while it runs backward, `add` gets name, output gradients and inputs of every layer.

    Inputs wait for their gradients; in the dtype `kept_in`, where it is given. Layers with one input share it.
    """
    latest: list[tuple[Any, Tensor]] = []  # holds the tensor itself, so that identity cannot be reused

    def kept(tensor: Tensor) -> Tensor:
        found = next((rows for given, rows in latest if given is tensor), None)
        if found is None:
            found = as_rows(tensor.detach())
            found = found if kept_in is None else found.to(kept_in)
            latest[:] = [*latest[-1:], (tensor, found)]
        return found

    def keep(name: str):
        def hook(module: Any, args: tuple, output: Tensor) -> None:
            rows = kept(args[0])
            output.register_hook(lambda gradient: _named(name, partial(add, name), as_rows(gradient), rows))

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with removed_afterwards(handles), graph_from_inputs(model), evaluating(model), streamed(model):
        with hooks.supervised_logits(model, batch["labels"]):
            loss = per_sample_loss(model(**inputs).logits, batch["labels"]).sum()  # no name keeps the logits alive
        loss.backward()


def exact_passes(
    groups: Sequence[Sequence[str]], layers: dict[str, Any], plan: FeaturePlan
) -> list[list[str]] | None:  # fmt: skip
    """`FeaturePlan.exact_passes` of layers in groups of one input, as the main process decides it by its memory."""
    widths = {name: layer.in_features for name, layer in layers.items()}
    return distributed.from_main(plan.exact_passes(groups, widths, next(iter(layers.values())).weight.device))


def _features_exactly(model: Any, layers: dict[str, Any], batch: dict, plan: FeaturePlan) -> bool:
    groups = shared_inputs(model, layers, batch) if plan.statistic == "auto" else []
    widths = [layers[group[0]].in_features for group in groups]
    return plan.exact(widths, next(iter(layers.values())).weight.device)


def _over_processes(statistic: Any) -> Any:
    """Sum over processes. Sketches of features are not linear: they are gathered and merged in rank order."""
    from mllm_keeplora.linalg import FrequentDirections, GradientRange

    if isinstance(statistic, FrequentDirections):
        if distributed.world_size() == 1:
            return statistic
        sketches = distributed.gather(statistic.to("cpu"))  # else all would come back on the first process's GPU
        whole = sketches[0].to(statistic.device)
        for other in sketches[1:]:
            whole.merge(other)
        return whole
    if isinstance(statistic, GradientRange) and distributed.world_size() > 1:
        reach = statistic.reach()
        distributed.all_reduce([reach])
        statistic.turn(reach)  # to the range of all that the processes hold
    distributed.all_reduce(statistic.tensors())
    return statistic


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


def _refuse_missing(missing: Collection[str], what: str) -> None:
    if missing:
        raise RuntimeError(f"{len(missing)} target layers {what}, first {min(missing)}")
