"""Statistics of what goes into target layers, streamed into `linalg` accumulators, and any measure of their rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.models.running import removed_afterwards
from mllm_keeplora.probes.passes import counted, looking, named, over_processes, refuse_missing
from mllm_keeplora.probes.plans import EXACT_FEATURES, FeaturePlan, by_identity
from mllm_keeplora.probes.rows import ChosenRows
from mllm_keeplora.system import distributed

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.models.family import Family
    from mllm_keeplora.probes.plans import Features


def collect_moments(
    family: Family,
    model: Any,
    layers: dict[str, Any],
    batches: Iterable[dict],
    plan: FeaturePlan = EXACT_FEATURES,
    passed_over: Collection[str] = (),
) -> Features:
    """Collect statistics of every target layer's input features over real tokens; padding never counts.

    Args:
        family: of the base.
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
    moments: Features = {}
    batches = iter(batches)
    first = next(batches, None)  # the main process has one, whatever the others have
    widths = []
    if first is not None and plan.statistic == "auto":
        widths = [layers[group[0]].in_features for group in shared_inputs(family, model, layers, first)]
    device = next(iter(layers.values())).weight.device
    exact = distributed.from_main(first is not None and plan.exact(widths, device))
    make = partial(plan.accumulator, exact=exact)
    latest: list[tuple[Any, Any]] = []  # holds the tensor itself, so that identity cannot be reused

    def add(name: str, rows: ChosenRows, module: Any, args: tuple) -> None:
        # The same tensor object is added once for all layers that receive it.
        shared = next((accumulator for tensor, accumulator in latest if tensor is args[0]), None)
        if shared is not None:
            assert moments.setdefault(name, shared) is shared, f"{name} no longer shares its input"
            return
        if name not in moments:
            moments[name] = make(args[0].shape[-1], device=args[0].device)
        named(name, moments[name].update, rows.of(args[0].detach()))
        latest[:] = [*latest[-1:], (args[0], moments[name])]

    for batch in chain(() if first is None else (first,), batches):
        if plan.padding:
            batch = type(batch)(family.padded(batch))
        rows, modules = ChosenRows.by_layer(family, model, batch, plan), counted(layers, batch).items()
        hooks = [module.register_forward_pre_hook(partial(add, name, rows(name))) for name, module in modules]
        with removed_afterwards(hooks), looking(family, model):
            model(**inputs_of(batch))
        latest.clear()
    # Layers may have been seen by some processes only: one may be without records, or pictures.
    groups = {tuple(group): None for share in distributed.gather(by_identity(moments)) for group in share}
    seen = {name for group in groups for name in group}
    refuse_missing(layers.keys() - seen - {*passed_over}, "saw no input")
    for group in [*groups, *((name,) for name in layers if name not in seen)]:
        layer = layers[group[0]]
        shared = moments.get(group[0]) or make(layer.in_features, device=layer.weight.device)
        moments.update(dict.fromkeys(group, over_processes(shared)))
    return {name: moments[name] for name in layers}


def shared_inputs(family: Family, model: Any, layers: dict[str, Any], batch: dict) -> list[list[str]]:
    """Group target layers by the tensor that feeds them, seen in one forward of model inputs."""
    fed: dict[str, Any] = {}  # holds the tensors until the end, so that no identity is reused

    def keep(name: str, module: Any, args: tuple) -> None:
        fed[name] = args[0]

    hooks = [module.register_forward_pre_hook(partial(keep, name)) for name, module in layers.items()]
    with removed_afterwards(hooks), looking(family, model):
        model(**inputs_of(batch))
    return by_identity(fed)


def measure_inputs(
    family: Family,
    model: Any,
    layers: dict[str, Any],
    batches: Iterable[dict],
    measure: Callable[[str], Callable[[Tensor, Tensor], Tensor]],
    lengths: dict[str, int],
) -> dict[str, Tensor]:
    """Sum a measure of every target layer's input and output rows over all real tokens and all processes.

    Args:
        family, model, layers: as in `collect_moments`.
        batches: model inputs.
        measure: layer -> function of rows (n, d_in) and (n, d_out) to a float64 vector, which is summed.
        lengths: layer -> length of that vector (a process without records needs it).

    Returns:
        Target layer -> (length,) float64 on the CPU.
    """
    import torch

    sums = {name: torch.zeros(lengths[name], dtype=torch.float64) for name in layers}
    functions = {name: measure(name) for name in layers}

    def add(name: str, rows: ChosenRows, module: Any, args: tuple, output: Tensor) -> None:
        sums[name] += functions[name](rows.of(args[0].detach()), rows.of(output.detach())).cpu()

    for batch in batches:
        rows, modules = ChosenRows.by_layer(family, model, batch, EXACT_FEATURES), counted(layers, batch).items()
        hooks = [module.register_forward_hook(partial(add, name, rows(name))) for name, module in modules]
        with removed_afterwards(hooks), looking(family, model):
            model(**inputs_of(batch))
    distributed.all_reduce(sums.values())
    return sums
