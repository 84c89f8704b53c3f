"""`Access` in front of every HTTP path, known or not: an ASGI application around another."""

import json
from collections.abc import Awaitable, Callable, MutableMapping

from rpc.security.access import Access
from rpc.security.principal import Forbidden, Unauthenticated, set_principal

# The types of the ASGI specification: https://asgi.readthedocs.io/en/latest/specs/www.html
Scope = MutableMapping[str, object]
Message = MutableMapping[str, object]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class HttpGuard:
    """Refuses requests without a key that is known, before their body is read, and says who makes the others."""

    def __init__(self, app: App, access: Access):
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 or 403 in the OpenAI API's envelope, or lets the application answer."""
        path = scope["path"]
        assert isinstance(path, str)
        try:
            principal = self._access.decide(path, _authorization(scope))
        except Unauthenticated as error:
            await _refuse(send, 401, str(error), "invalid_api_key")
        except Forbidden as error:
            await _refuse(send, 403, str(error), "forbidden")
        else:
            set_principal(principal)
            await self._app(scope, receive, send)


def _authorization(scope: Scope) -> str | None:
    headers = scope["headers"]
    assert isinstance(headers, list)
    values = [value for name, value in headers if name == b"authorization"]
    # Two keys in one request: which of them counts must not be left to chance.
    return values[0].decode("latin-1") if len(values) == 1 else None


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the request's body is not read
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
