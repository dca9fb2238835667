"""The majors of libraries that the tests have passed with; of a later one a start says that it has not been tried."""

from __future__ import annotations

from importlib import metadata

TRIED = {
    "torch": 2,
    "transformers": 5,
    "peft": 0,
    "accelerate": 1,
    "deepspeed": 0,
    "bitsandbytes": 0,
    "safetensors": 0,
    "datasets": 5,
    "numpy": 2,
    "scipy": 1,
    "scikit-learn": 1,
    "pandas": 3,
    "pillow": 13,
    "pydantic": 2,
}


def untried() -> list[str]:
    """Say of each installed library whose major version is later than any that was tried."""
    said = []
    for name, tried in TRIED.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if int(version.split(".")[0]) > tried:
            said.append(f"{name} {version} has not been tried; the tests have passed with versions up to {tried}.x")
    return said
