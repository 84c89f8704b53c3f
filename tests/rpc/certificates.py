"""An authority, and files signed by it, made for a test."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from rpc.client import Credentials
from rpc.security.config import SecurityConfig


class Authority:
    """Certificates of one authority, in a folder."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self._folder = folder
        self._authority = trustme.CA()
        self.certificate = folder / "authority.pem"
        self._authority.cert_pem.write_to_path(str(self.certificate))

    def issue(self, name: str, host: str = "localhost", lifetime: timedelta = timedelta(days=1)) -> tuple[str, str]:
        """Files of a certificate chain and its key; a negative lifetime has ended."""
        issued = self._authority.issue_cert(
            host, not_before=datetime.now(UTC) - timedelta(days=2), not_after=datetime.now(UTC) + lifetime
        )
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(str(key))
        return str(cert), str(key)

    def server(self, **fields: str | None) -> SecurityConfig:
        """A server with a certificate of this authority."""
        cert, key = self.issue("server")
        return SecurityConfig(tls_cert=cert, tls_key=key, **fields)

    def client(self, **fields: str | None) -> Credentials:
        """A client that trusts this authority. It calls 127.0.0.1, and wants the certificate of localhost."""
        return Credentials(root_certificates=str(self.certificate), server_name="localhost", **fields)
