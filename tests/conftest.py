"""One loaded model for the whole session."""

from collections.abc import Iterator

import pytest

from jaxserve.engine import Engine


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """SmolLM2 in float32, in this process, with the defaults of everything else but the context."""
    with Engine(model="smollm2-135m", dtype="float32", max_context=2048, max_waiting=64) as engine:
        yield engine
