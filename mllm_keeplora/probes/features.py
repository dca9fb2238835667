"""Statistics of what goes into target layers, streamed into `linalg` accumulators."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.models.running import removed_afterwards
from mllm_keeplora.probes.passes import counted, looking, named, over_processes, refuse_missing
from mllm_keeplora.probes.plans import EXACT_FEATURES, FeaturePlan
from mllm_keeplora.probes.rows import ChosenRows
from mllm_keeplora.system import distributed

if TYPE_CHECKING:
    from mllm_keeplora.linalg import FrequentDirections, MomentAccumulator
    from mllm_keeplora.models.family import Family


def collect_moments(
    family: Family,
    model: Any,
    layers: dict[str, Any],
    batches: Iterable[dict],
    plan: FeaturePlan = EXACT_FEATURES,
    passed_over: Collection[str] = (),
) -> dict[str, MomentAccumulator | FrequentDirections]:
    """Statistics of every target layer's input features over real tokens; padding never counts.

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

    moments: dict[str, MomentAccumulator | FrequentDirections] = {}
    batches = iter(batches)
    first = next(batches, None)  # the main process has one, whatever the others have
    exact = distributed.from_main(first is not None and _features_exactly(family, model, layers, first, plan))
    make = partial(plan.accumulator, exact=exact)
    for batch in chain(() if first is None else (first,), batches):
        rows = ChosenRows(family.token_kinds(model, batch), plan)
        with _input_hooks(counted(layers, batch), moments, rows, make), looking(family, model):
            model(**inputs_of(batch))
    groups = {tuple(group): None for share in distributed.gather(_sharing(moments)) for group in share}
    seen = {name for group in groups for name in group}  # by any process: one may be without records, or pictures
    refuse_missing(layers.keys() - seen - {*passed_over}, "saw no input")
    for group in [*groups, *((name,) for name in layers if name not in seen)]:
        layer = layers[group[0]]
        shared = moments.get(group[0]) or make(layer.in_features, device=layer.weight.device)
        moments.update(dict.fromkeys(group, over_processes(shared)))
    return {name: moments[name] for name in layers}


def shared_inputs(family: Family, model: Any, layers: dict[str, Any], batch: dict) -> list[list[str]]:
    """Target layers grouped by the tensor that feeds them, seen in one forward of model inputs."""

    seen: dict[int, list[str]] = {}
    tensors = []  # held until the end, so that no identity is reused

    def keep(name: str):
        def hook(module: Any, args: tuple) -> None:
            tensors.append(args[0])
            seen.setdefault(id(args[0]), []).append(name)

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    with removed_afterwards(handles), looking(family, model):
        model(**inputs_of(batch))
    return list(seen.values())


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
            named(name, accumulator.update, rows.of(args[0].detach()))
            latest[:] = [*latest[-1:], (args[0], accumulator)]

        return hook

    with removed_afterwards([module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]):
        yield


def exact_passes(
    groups: Sequence[Sequence[str]], layers: dict[str, Any], plan: FeaturePlan
) -> list[list[str]] | None:  # fmt: skip
    """`FeaturePlan.exact_passes` of layers in groups of one input, as the main process decides it by its memory."""
    widths = {name: layer.in_features for name, layer in layers.items()}
    return distributed.from_main(plan.exact_passes(groups, widths, next(iter(layers.values())).weight.device))


def _features_exactly(family: Family, model: Any, layers: dict[str, Any], batch: dict, plan: FeaturePlan) -> bool:
    groups = shared_inputs(family, model, layers, batch) if plan.statistic == "auto" else []
    widths = [layers[group[0]].in_features for group in groups]
    return plan.exact(widths, next(iter(layers.values())).weight.device)


def _sharing(moments: dict[str, Any]) -> list[list[str]]:
    """Names of layers by the accumulator that they share."""
    groups: dict[int, list[str]] = {}
    for name, accumulator in moments.items():
        groups.setdefault(id(accumulator), []).append(name)
    return list(groups.values())
