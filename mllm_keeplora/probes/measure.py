"""Any measure of a layer's inputs and outputs, summed over records and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from mllm_keeplora.models.family import inputs_of
from mllm_keeplora.models.running import removed_afterwards
from mllm_keeplora.probes.passes import counted, looking
from mllm_keeplora.probes.plans import EXACT_FEATURES
from mllm_keeplora.probes.rows import ChosenRows
from mllm_keeplora.system import distributed

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.models.family import Family


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
    for batch in batches:
        rows = ChosenRows(family.token_kinds(model, batch), EXACT_FEATURES)

        def keep(name: str, rows: ChosenRows = rows):
            def hook(module: Any, args: tuple, output: Tensor) -> None:
                sums[name] += functions[name](rows.of(args[0].detach()), rows.of(output.detach())).cpu()

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in counted(layers, batch).items()]
        with removed_afterwards(handles), looking(family, model):
            model(**inputs_of(batch))
    distributed.all_reduce(sums.values())
    return sums
