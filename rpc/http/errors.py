"""Errors as the OpenAI API has them: a status, and `{"error": {message, type, param, code}}`."""

import json
import logging
import math
from dataclasses import dataclass, field

from starlette.responses import Response

from jaxserve.log import current_request_id
from jaxserve.request_errors import (
    DuplicateRequestId,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    clipped,
)
from rpc.errors import DeadlineExceeded, RequestFailed
from rpc.security.principal import Forbidden, Unauthenticated

logger = logging.getLogger(__name__)

RETRY_AFTER_DRAIN = 5.0
"""Seconds after which a client is told to try again where the server takes no requests."""


@dataclass
class HttpError(Exception):
    """An answer that is an error."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    """`type` in the envelope."""
    param: str | None = None
    """The field at fault."""
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def envelope(self) -> bytes:
        """The body."""
        error = {"message": clipped(self.message), "type": self.kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()

    def response(self) -> Response:
        """The answer, which ends the connection where the request's body may not have been read."""
        headers = dict(self.headers)
        if self.status in (408, 413, 415):
            headers["connection"] = "close"
        return Response(self.envelope(), self.status, headers, media_type="application/json")


def error_of(error: Exception) -> HttpError:
    """The answer to an exception. One that nobody expected is logged, and status 500."""
    message = str(error)
    match error:
        case HttpError():
            return error
        case InvalidRequest():
            return HttpError(400, message, param=error.field, code="invalid_value")
        case ModelNotFound():
            return HttpError(404, message, param="model", code="model_not_found")
        case DuplicateRequestId():
            return HttpError(409, message, param="request_id", code="duplicate_request_id")
        case Unauthenticated():
            headers = {"www-authenticate": "Bearer"}
            return HttpError(401, message, "authentication_error", code="invalid_api_key", headers=headers)
        case Forbidden():
            return HttpError(403, message, "permission_error", code="forbidden")
        case QueueFull():
            headers = _retry_after(error.retry_after)
            return HttpError(429, message, "rate_limit_error", code="queue_full", headers=headers)
        case EngineUnavailable():
            headers = _retry_after(RETRY_AFTER_DRAIN)
            return HttpError(503, message, "service_unavailable", code="engine_unavailable", headers=headers)
        case DeadlineExceeded():
            return HttpError(504, message, "timeout", code="deadline_exceeded")
        case RequestFailed():
            return HttpError(500, message, "server_error", code="request_failed")
    logger.error("request %s failed: %r", current_request_id(), error, exc_info=error)
    return HttpError(500, f"internal error in request {current_request_id()}", "server_error", code="internal")


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(max(1, math.ceil(seconds)))}
