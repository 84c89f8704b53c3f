"""Logs: one JSON object a line, with what was given beside the message."""

import io
import json
import logging

import pytest

from jaxserve.log import configure_logging

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


def test_only_warnings_are_logged_unless_asked_for(stream: io.StringIO):
    configure_logging(stream=stream)
    logging.getLogger("jaxserve.engine").info("quiet")
    assert stream.getvalue() == ""
    configure_logging("debug", stream)
    logging.getLogger("jaxserve.engine").debug("asked for")
    logging.getLogger("someone.else").info("not ours")
    assert [json.loads(line)["message"] for line in stream.getvalue().splitlines()] == ["asked for"]
