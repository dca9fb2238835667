import copy

import pytest

RESULTS = {
    "format": 1,
    "name": "mini-keeplora",
    "benchmark": "mini_dcl",
    "domains": ["RS", "Med", "AD", "Sci", "Fin"],
    "strategy": "keeplora",
    "base": "tiny-llava",
    "seed": 0,
    "score_matrix": [
        [63.2, 40.6, 38.9, 15.8, 27.4],
        [61.9, 66.4, 39.2, 17.1, 26.0],
        [60.3, 64.8, 58.7, 16.6, 22.9],
        [60.8, 63.9, 57.1, 55.3, 24.7],
        [59.7, 63.1, 56.2, 53.9, 71.6],
    ],
    "zero_shot": [39.1, 40.2, 39.7, 15.4, 30.3],
    "blind": [35.3, 44.7, 45.3, 30.0, 22.0],
    "general": {"general": [82.4, 81.0, 80.2, 79.9, 79.1, 78.6]},
    "metrics": {
        "last": 60.9,
        "average": 48.64,
        "transfer": 25.0,
        "mft": 63.04,
        "mfn": 60.9,
        "maa": 61.8,
        "bwt": -2.68,
        "forgetting": 2.68,
        "plasticity": 63.04,
        "ap": 60.9,
        "ft": 2.68,
        "fwt": -1.3,
        "fwt_alone": None,
        "general_retention": 0.9539,
    },
    "wall_seconds": {"prepare": 3.9, "gradient": 14.2, "train": 192.4, "consolidate": 11.8, "evaluate": 41.0},
    "peak_memory_bytes": 1_420_000_000,
    "questions": {"RS": 400, "Med": 400, "AD": 400, "Sci": 400, "Fin": 400, "general": 500},
    "environment": {"torch": "2.6.0", "transformers": "5.0.0", "device": "cpu, 2 threads"},
    "config": "name: mini-keeplora\nstrategy:\n  name: keeplora\n  rank: 16\nseed: 0\n",
    "per_type": {"RS": {"count": 41.2, "yes/no": 78.0}, "Fin": {"trend": 71.6}},
}


@pytest.fixture
def results():
    return copy.deepcopy(RESULTS)


@pytest.fixture
def finetune_results():
    """A run that measures seen domains only and forgets."""
    results = copy.deepcopy(RESULTS)
    results |= {"name": "mini-finetune", "strategy": "finetune"}
    results["score_matrix"] = [
        [64.1, None, None, None, None],
        [48.8, 66.9, None, None, None],
        [41.5, 51.0, 59.3, None, None],
        [33.0, 46.2, 44.1, 56.0, None],
        [29.7, 42.5, 40.8, 36.1, 72.2],
    ]
    results["general"] = {"general": [82.4, 71.0, 60.2, 51.9, 44.1, 39.6]}
    results["metrics"] |= {"last": 44.3, "average": None, "transfer": None, "maa": 54.1, "plasticity": 63.7}
    results["metrics"] |= {"bwt": -24.3, "forgetting": 24.3, "general_retention": 0.481}
    return results
