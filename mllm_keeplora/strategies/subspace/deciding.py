"""Feature statistics that are good enough to decide by a threshold: a sketch if it is, else exact moments.

Exact moments of all layers may not fit where sketches were taken for their size, so they come some layers at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mllm_keeplora.probes.plans import FeaturePlan
from mllm_keeplora.strategies.base import Context
from mllm_keeplora.system.log import log

if TYPE_CHECKING:
    from mllm_keeplora.linalg import FrequentDirections
    from mllm_keeplora.probes.plans import Features


def decided_features(
    context: Context,
    samples: int | float,
    plan: FeaturePlan,
    decides: Callable[[str, FrequentDirections], bool],
    of: tuple[str, ...] = (),
) -> Iterator[Features]:
    """Give statistics of every target layer's inputs, in parts: each layer is in one of them.

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

    rounds = context.passes.rounds(plan)
    if rounds is not None:
        log.info("exact moments of all layers at once are too large: %d passes over the records", len(rounds))
    else:
        features = context.passes.features(samples, plan, of)
        clear = context.processes.dealt(features.get, is_clear)
        unclear = {layer: features[layer] for layer, enough in clear.items() if not enough}
        sketches = [each for each in features.values() if isinstance(each, FrequentDirections)]
        rounds = plan.exact_rounds(unclear, sketches)
        if unclear:
            text = "%d layers need exact moments, as their sketches are too small, first %s: %d more passes"
            log.info(text, len(unclear), next(iter(unclear)), len(rounds))
        part = {layer: each for layer, each in features.items() if clear[layer]}
        for held in (features, unclear, sketches):  # nothing but the part itself keeps statistics alive
            held.clear()
        yield part
        part.clear()
    for layers in rounds:
        part = context.passes.features(samples, replace(plan, statistic="exact"), of, layers)
        yield part
        part.clear()
