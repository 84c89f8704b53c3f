"""The one decision of every protocol: may this path be called with this header, and by whom is it then called."""

from rpc.security.keys import KeyFile
from rpc.security.principal import EVERYBODY, Forbidden, Principal, Unauthenticated

OPEN_PATHS = frozenset(
    {
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/List",
        "/grpc.health.v1.Health/Watch",
        "/vllm.grpc.engine.VllmEngine/HealthCheck",
        "/jetstream_proto.Orchestrator/HealthCheck",
        "/health",
        "/",
    }
)
"""What probes ask, and what needs no key: gRPC methods and HTTP paths. They say whether the server serves, no more."""

ADMIN_PATHS = ("/admin", "/debug", "/jaxserve.v1.Control/Profile", "/jaxserve.v1.Control/Drain")
"""Starts of the paths that only an admin's key opens."""

PROBE = Principal(tenant="", is_admin=False)
"""The caller of an open path, whoever it is."""


class Access:
    """Decides by the keys of a file, or lets everybody in where there is none."""

    def __init__(self, keys: KeyFile | None):
        self.keys = keys

    def refresh(self) -> None:
        """Takes in a key file that has changed. Call it a few times a second."""
        if self.keys is not None:
            self.keys.refresh()

    def decide(self, path: str, authorization: str | None) -> Principal:
        """Who makes a call.

        Args:
            path: of the URL; in gRPC the method's full name, "/package.Service/Method".
            authorization: the value of the header of that name; None where there is none.

        Raises:
            Unauthenticated: no key, or one that is not known.
            Forbidden: the path is an admin's and the key is not.
        """
        if self.keys is None:
            return EVERYBODY
        if path in OPEN_PATHS:
            return PROBE
        scheme, _, key = (authorization or "").strip().partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("an API key is needed, in the header `authorization: Bearer KEY`")
        principal = self.keys.principal_of(key.strip())
        if principal is None:
            raise Unauthenticated("the API key is not known")
        if path.startswith(ADMIN_PATHS) and not principal.is_admin:
            raise Forbidden(f"{path} needs an admin key")
        return principal
