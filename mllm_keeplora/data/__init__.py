"""Records, benchmarks, readers and collation. Knows how data looks on disk; knows no strategy and no training."""

from mllm_keeplora.data.benchmarks import PATHS, Benchmark, Domain, Suite, TestSet
from mllm_keeplora.data.loading import load_benchmark, with_published_epochs
from mllm_keeplora.data.schema import Media, Record, Turn

__all__ = [
    "PATHS",
    "Benchmark",
    "Domain",
    "Media",
    "Record",
    "Suite",
    "TestSet",
    "Turn",
    "load_benchmark",
    "with_published_epochs",
]
