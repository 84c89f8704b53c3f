"""An engine in front of which each call acts for its tenant alone."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from jaxserve.request import Request
from rpc.security.principal import current_principal
from rpc.served_engine import EventStream, ServedEngine


class _TenantEngine:
    """Submits and aborts for the tenant of the call that runs. Everything else is the engine's own."""

    def __init__(self, engine: ServedEngine):
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def submit_all(self, requests: Sequence[Request]) -> Sequence[EventStream]:
        tenant = current_principal().tenant
        return self._engine.submit_all([replace(request, tenant=tenant) for request in requests])

    def attach(self, request_id: str, from_token: int) -> EventStream:
        return self._engine.attach(request_id, from_token, current_principal().tenant)

    def abort(self, request_id: str) -> bool:
        principal = current_principal()
        return self._engine.abort(request_id, None if principal.is_admin else principal.tenant)


def for_tenants(engine: ServedEngine) -> ServedEngine:
    """The engine as handlers see it on a server with keys: the authenticated tenant goes into every request, and with
    it into the salt of the prefix cache, the bound of a tenant's requests, and who may abort or attach. A handler
    cannot forget it: where no guard has said who calls, submit and abort raise LookupError."""
    return cast(ServedEngine, _TenantEngine(engine))
