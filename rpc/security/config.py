"""What shapes the security of a server: one frozen dataclass. Imports no gRPC, so that command lines are quick."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jaxserve.paths import user_path

if TYPE_CHECKING:
    from rpc.security.tls import TlsFiles


@dataclass(frozen=True)
class SecurityConfig:
    """Keys, certificates and who may reach the server."""

    api_keys: str | None = None
    """File of API keys by tenant, as `jaxserve add-key` writes it; read again when it changes. None needs no key."""
    tls_cert: str | None = None
    """PEM file of the server's certificate chain; None is plain text."""
    tls_key: str | None = None
    """PEM file of its private key."""
    tls_client_ca: str | None = None
    """PEM file of the authority whose certificates clients must show; None asks for none."""
    allow_open: bool = False
    """Bind an address that is not loopback without keys or without TLS, as behind a proxy that has both."""

    def __post_init__(self) -> None:
        """Raises ValueError naming the field."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: both or neither must be given")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: needs tls_cert and tls_key")

    def tls_files(self) -> "TlsFiles | None":
        """The certificates; None for plain text."""
        from rpc.security.tls import TlsFiles

        if self.tls_cert is None or self.tls_key is None:
            return None
        cert, key, authority = self.tls_cert, self.tls_key, self.tls_client_ca
        return TlsFiles(path_of(cert), path_of(key), None if authority is None else path_of(authority))

    def check_host(self, host: str) -> None:
        """Raises ValueError where an address would let others in without a key or in plain text."""
        if self.allow_open or is_loopback(host):
            return
        client_known = self.api_keys is not None or self.tls_client_ca is not None
        missing = [*([] if client_known else ["api_keys or tls_client_ca"]), *([] if self.tls_cert else ["tls_cert"])]
        if missing:
            raise ValueError(
                f"host: {host} is not loopback and lets others in; it needs {' and '.join(missing)}, or allow_open"
            )


def path_of(name: str) -> Path:
    """The path of a file that a field names. Raises ValueError where it begins with a home folder that is not known."""
    try:
        return user_path(name)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name may become any address
