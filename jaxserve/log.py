"""Structured, quiet logs: one JSON object a line on standard error."""

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import TextIO

_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}


_request_id: ContextVar[str | None] = ContextVar("jaxserve_request_id", default=None)


def set_request_id(request_id: str) -> None:
    """Says whose the log lines of this context are: a task's, and of the tasks and threads that it starts."""
    _request_id.set(request_id)


def current_request_id() -> str | None:
    """Whose the log lines of this context are; None where nobody has said."""
    return _request_id.get()


class JsonFormatter(logging.Formatter):
    """A record as one JSON line: time (UTC), level, logger, message, the request's id where one is known, and what was
    given as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **({} if (request_id := current_request_id()) is None else {"request_id": request_id}),
            **{name: value for name, value in vars(record).items() if name not in _STANDARD},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str = "warning", stream: TextIO | None = None) -> None:
    """Sends the logs of jaxserve and rpc at `level` and above, and warnings of all else, Python's too, to a stream."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    for name in ("jaxserve", "rpc", "pallas_kernels"):
        logging.getLogger(name).setLevel(level.upper())
