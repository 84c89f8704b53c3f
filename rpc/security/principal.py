"""Who makes a call. Set by the guard of each protocol before a handler runs, and read where a request is submitted."""

from contextvars import ContextVar
from dataclasses import dataclass

from jaxserve.request_errors import RequestError


class Unauthenticated(RequestError):
    """The call carries no key, or one that is not known."""


class Forbidden(RequestError):
    """The key is known, but not for this call."""


@dataclass(frozen=True)
class Principal:
    """An authenticated caller.

    Attributes:
        tenant: whose requests, cached prefixes and streams these are; "" where the server has no keys.
        is_admin: whether calls that touch other tenants or the server itself are allowed.
    """

    tenant: str
    is_admin: bool = False

    def reaches(self, other: "Principal") -> bool:
        """Whether it may abort what the other has asked for."""
        return self.is_admin or self.tenant == other.tenant


EVERYBODY = Principal(tenant="", is_admin=True)
"""The caller of a server without keys, which is bound to loopback or said to be open."""

_principal: ContextVar[Principal] = ContextVar("jaxserve_principal")


def set_principal(principal: Principal) -> None:
    """Says who makes the call that runs in this context."""
    _principal.set(principal)


def current_principal() -> Principal:
    """Who makes the call that runs here. Raises LookupError where no guard has said so: in a context that is not the
    call's, as that of a thread that was started without it."""
    return _principal.get()
