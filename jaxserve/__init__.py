"""jaxserve: a portable JAX engine that serves language models with asynchronous continuous batching."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig
    from jaxserve.engine import Engine
    from jaxserve.events import Completion, Delta, Finished, Started
    from jaxserve.request import Request, SamplingParams, StoppingParams

_HOMES = {
    "Engine": "jaxserve.engine",
    "EngineConfig": "jaxserve.config",
    **dict.fromkeys(("Completion", "Delta", "Finished", "Started"), "jaxserve.events"),
    **dict.fromkeys(("Request", "SamplingParams", "StoppingParams"), "jaxserve.request"),
}

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "Finished",
    "Request",
    "SamplingParams",
    "Started",
    "StoppingParams",
]


def __getattr__(name: str) -> object:
    """Imports on first use, so that the command line's help and a client without JAX start at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
