"""Why a request is not served, each with what its sender can do about it."""

RETRY_AFTER = 1.0
"""Seconds after which a client for which there is no room is told to try again."""
MAX_MESSAGE_BYTES = 600
"""Of an error's message. Over gRPC it is sent percent-encoded and again in the details; clients take 8 KiB of headers
in all."""


def clipped(text: str) -> str:
    """A message short enough for the headers of any client. What a request holds may be quoted in it, and what is wrong
    stands before or after that: both ends are kept."""
    data = text.encode(errors="replace")
    if len(data) <= MAX_MESSAGE_BYTES:
        return data.decode()
    gap, half = b" ... ", MAX_MESSAGE_BYTES // 2
    return (data[: half - len(gap)] + gap + data[-half:]).decode(errors="ignore")


class RequestError(Exception):
    """A request that was not accepted. Nothing has been allocated for it."""


class InvalidRequest(RequestError, ValueError):
    """A field of a request is out of range.

    Attributes:
        field: the API name of the field, dotted where nested in messages.
        reason: what is wrong, with the value and the limit.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class ModelNotFound(RequestError):
    """The request names a model that this engine does not serve."""


class QueueFull(RequestError):
    """The admission queue is at its bound; try again after `retry_after` seconds."""

    def __init__(self, limit: int, retry_after: float = RETRY_AFTER):
        super().__init__(f"the queue is full: it takes {limit} sequences, those that run included")
        self.limit = limit
        self.retry_after = retry_after


class TenantBusy(QueueFull):
    """A tenant has as many requests in flight as one may; others may still be accepted."""

    def __init__(self, limit: int, retry_after: float = RETRY_AFTER):
        super().__init__(limit, retry_after)
        self.args = (f"the tenant has {limit} requests in flight (limit {limit})",)


class DuplicateRequestId(RequestError):
    """A request with this id is still active."""


class StreamNotFound(RequestError):
    """No stream of a request with this id is kept for this tenant: it was not resumable, or that is too long ago."""


class StreamTaken(RequestError):
    """Another reader has taken up the stream; it goes on there."""


class EngineUnavailable(RequestError):
    """The engine is draining, stopped or failed, and takes no requests."""
