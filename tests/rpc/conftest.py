"""An engine whose device is simulated: scheduler, pages, delivery and the core's process are the real ones."""

from collections.abc import Iterator

import pytest

from jaxserve.engine import Engine


@pytest.fixture(scope="session")
def simulated() -> Iterator[Engine]:
    """512 slots and 16 requests that may wait, 50 ms a step; see `simulated.simulated_ids`."""
    with Engine(simulated_step_ms=50.0, slots=512, max_waiting=16, max_context=2048, core="process") as engine:
        yield engine
