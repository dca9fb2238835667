"""Feature statistics that a threshold can be decided by: a sketch where it knows enough, else exact moments.

Exact moments of all layers may not fit where sketches were taken for their size, so they come some layers at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from mllm_keeplora.probes.plans import FeaturePlan
from mllm_keeplora.strategies.base import Context
from mllm_keeplora.system.log import log

if TYPE_CHECKING:
    from mllm_keeplora.linalg import FrequentDirections, MomentAccumulator

    Features = dict[str, MomentAccumulator | FrequentDirections]  # statistics by layer


def decided_features(
    context: Context,
    samples: int | float,
    plan: FeaturePlan,
    decides: Callable[[str, FrequentDirections], bool],
    of: tuple[str, ...] = (),
) -> Iterator[Features]:
    """Statistics of every target layer's inputs, in parts: each layer is in one of them.

    Under `auto`, exact moments that do not fit all at once come in a few passes over the records. Of sketches, layers
    whose sketch does not decide are passed over and looked at again, with exact moments, so many in each further pass
    as take no more memory than the sketches of all layers did. A part is emptied when the next is asked for.

    Args:
        context: of the domain, branches as they are to be looked at.
        samples, plan, of: as in `Passes.features`.
        decides: whether a layer's sketch knows enough for its threshold.
    """
    from mllm_keeplora.linalg import FrequentDirections

    def is_clear(layer: str, source: Any) -> bool:
        return not isinstance(source, FrequentDirections) or decides(layer, source)

    passes = context.passes.rounds(plan)
    if passes is not None:
        log.info("exact moments of all layers at once are too large: %d passes over the records", len(passes))
        yield from _exact(context, samples, plan, of, passes)
        return
    features = context.passes.features(samples, plan, of)
    clear = context.processes.dealt(features.get, is_clear)
    unclear = {layer: features[layer] for layer, enough in clear.items() if not enough}
    rounds = plan.exact_rounds(unclear, [each for each in features.values() if isinstance(each, FrequentDirections)])
    if unclear:
        log.info(
            "%d layers need exact moments, as their sketches are too small, first %s: %d more passes",
            len(unclear), next(iter(unclear)), len(rounds),
        )  # fmt: skip
    part = {layer: each for layer, each in features.items() if clear[layer]}
    features.clear()
    unclear.clear()
    yield part
    part.clear()
    yield from _exact(context, samples, plan, of, rounds)


def _exact(
    context: Context, samples: int | float, plan: FeaturePlan, of: tuple[str, ...], rounds: list[list[str]]
) -> Iterator[Features]:
    for layers in rounds:
        part = context.passes.features(samples, plan.made_exact(), of, layers)
        yield part
        part.clear()
