"""One loaded model for the whole session, and what a test must not leave changed."""

import logging
from collections.abc import Iterator

import pytest

from jaxserve.engine import Engine


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests whose full size is for a machine of one's own."""
    parser.addoption("--mutations", type=int, default=3000, help="mutated protobuf messages to send; in full 100,000")
    parser.addoption("--schemathesis-cases", type=int, default=25, help="HTTP cases for each route; in full 3,500")
    parser.addoption("--connections", type=int, default=1000, help="connections left idle; in full 10,000")
    parser.addoption("--resets", type=int, default=3000, help="HTTP connections that are reset; in full 50,000")
    parser.addoption("--schemas", type=int, default=60, help="random JSON schemas to hold outputs to")
    parser.addoption("--aot-matrix", choices=("covering", "full"), default="covering", help="cells of the aot matrices")


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """SmolLM2 in float32, in this process, with the defaults of everything else but the context."""
    with Engine(model="smollm2-135m", dtype="float32", max_context=2048, max_waiting=64) as engine:
        yield engine


@pytest.fixture
def logging_unchanged() -> Iterator[None]:
    """For tests of what configures logging: the handlers and levels from before come back."""
    loggers = [logging.getLogger(name) for name in (None, "jaxserve", "rpc", "pallas_kernels")]
    before = [(logger, logger.handlers[:], logger.level) for logger in loggers]
    yield
    logging.captureWarnings(False)
    for logger, handlers, level in before:
        logger.handlers[:] = handlers
        logger.setLevel(level)
