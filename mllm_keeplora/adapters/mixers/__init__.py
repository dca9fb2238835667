"""The mixers that there are, by the kind that files name; a class is imported when it is needed."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_keeplora.errors import UserError, first_line, shortened
from mllm_keeplora.system import files

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters.mixers.mixing import Mixer

MIXERS = {
    "experts": "mllm_keeplora.adapters.mixers.experts:Experts",
    "gates": "mllm_keeplora.adapters.mixers.gates:Gates",
    "magnitudes": "mllm_keeplora.adapters.mixers.magnitudes:Magnitudes",
    "pool": "mllm_keeplora.adapters.mixers.pool:Pool",
    "router": "mllm_keeplora.adapters.mixers.router:Router",
    "scores": "mllm_keeplora.adapters.mixers.router:Scores",
    "similarity": "mllm_keeplora.adapters.mixers.similarity:Similarity",
    "transforms": "mllm_keeplora.adapters.mixers.transforms:Transforms",
}


def rebuilt(facts: dict[str, Any], tensors: dict[str, Tensor]) -> Mixer:
    """Make the mixer that `Mixer.stored` told of."""
    module, name = MIXERS[facts["kind"]].split(":")
    mixer = getattr(import_module(module), name)(**facts["settings"])
    mixer.load_state_dict(tensors)
    return mixer


def read_mixer(path: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> Mixer:
    """Make the mixer that a file tells of; a UserError names the file if it tells of none."""
    try:
        return rebuilt(facts, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        told = shortened(first_line(error))
        raise UserError(f"{path} is damaged: its mixer cannot be made again: {told}") from None


def save_mixer(path: Path, mixer: Mixer) -> None:
    facts, tensors = mixer.stored()
    files.write_tensors(path, tensors, {"mixer": json.dumps(facts)})


def load_mixer(path: Path) -> Mixer:
    return read_mixer(path, files.read_facts(path, "mixer"), files.read_tensors(path))
