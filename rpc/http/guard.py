"""`Access` in front of every route, known or not."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rpc.http.errors import error_of
from rpc.security.access import Access
from rpc.security.principal import Forbidden, Unauthenticated, set_principal


class HttpGuard:
    """Refuses requests without a key that is known, before their body is read, and says who makes the others."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The routes run in the same task, and so find the principal in their context."""
        keys = Headers(scope=scope).getlist("authorization")
        try:
            # Two keys in one request: which of them counts must not be left to chance.
            principal = self._access.decide(scope["path"], keys[0] if len(keys) == 1 else None)
        except (Unauthenticated, Forbidden) as error:
            refusal = error_of(error)
            refusal.headers["connection"] = "close"
            await refusal.response()(scope, receive, send)
            return
        set_principal(principal)
        await self._app(scope, receive, send)
