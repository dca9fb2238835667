"""Low-rank branches on peft: open, set A, freeze, combine, merge, save, load. Knows no strategy and no data."""

from mllm_keeplora.adapters.branches import Adapters, adapters_for
from mllm_keeplora.adapters.factors import Branch, Factors, concatenate
from mllm_keeplora.adapters.history import merge_for_good

__all__ = ["Adapters", "Branch", "Factors", "adapters_for", "concatenate", "merge_for_good"]
