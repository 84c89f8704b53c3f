"""Logs: one JSON object a line, with what was given beside the message."""

import asyncio
import io
import json
import logging
import warnings

import pytest

from jaxserve.log import configure_logging, set_request_id

pytestmark = pytest.mark.usefixtures("logging_unchanged")


@pytest.fixture
def stream() -> io.StringIO:
    """Takes the logs."""
    return io.StringIO()


def test_a_record_is_one_json_line_with_its_request_id(stream: io.StringIO):
    configure_logging(stream=stream)
    logging.getLogger("rpc.servicer").error("failed:\n%d", 3, extra={"request_id": "a\nb"})
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert (record["level"], record["logger"], record["message"]) == ("error", "rpc.servicer", "failed:\n3")
    assert record["request_id"] == "a\nb"


def test_an_exception_stays_on_the_line(stream: io.StringIO):
    configure_logging(stream=stream)
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("jaxserve").exception("no")
    (line,) = stream.getvalue().splitlines()
    assert "ValueError: bad" in json.loads(line)["exception"]


def test_a_warning_of_python_is_a_line_like_others(stream: io.StringIO):
    """JAX warns so where its cache of compiled programs cannot be written."""
    configure_logging(stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("the disk is full", UserWarning, stacklevel=1)
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert (record["level"], record["logger"]) == ("warning", "py.warnings") and "the disk is full" in record["message"]


def test_only_warnings_are_logged_unless_asked_for(stream: io.StringIO):
    configure_logging(stream=stream)
    logging.getLogger("jaxserve.engine").info("quiet")
    assert stream.getvalue() == ""
    configure_logging("debug", stream)
    logging.getLogger("jaxserve.engine").debug("asked for")
    logging.getLogger("someone.else").info("not ours")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["asked for"]


def test_lines_of_a_requests_task_and_threads_carry_its_id_and_those_of_others_do_not(stream: io.StringIO):
    configure_logging(stream=stream)
    logger = logging.getLogger("rpc")

    async def request(name: str) -> None:
        set_request_id(name)
        await asyncio.sleep(0)
        await asyncio.to_thread(logger.warning, "of %s", name)

    async def scenario() -> None:
        await asyncio.gather(request("a"), request("b"))
        logger.warning("of nobody")

    asyncio.run(scenario())
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {line["message"]: line.get("request_id") for line in lines} == {"of a": "a", "of b": "b", "of nobody": None}
