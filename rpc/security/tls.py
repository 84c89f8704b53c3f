"""Certificates of the server: one set of files for gRPC and HTTP."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc


class TlsError(ValueError):
    """The certificates cannot be used; says which file and why."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files.

    Attributes:
        cert: the server's certificate and those between it and its authority.
        key: its private key.
        client_ca: the authority of the clients' certificates; with it a client must show one (mutual TLS).
    """

    cert: Path
    key: Path
    client_ca: Path | None = None

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`. gRPC takes TLS 1.2 and 1.3. Raises TlsError."""
        self.ssl_context()  # says what is wrong with a file, which gRPC does not
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.cert.read_bytes())],
            root_certificates=None if self.client_ca is None else self.client_ca.read_bytes(),
            require_client_auth=self.client_ca is not None,
        )

    def ssl_context(self) -> ssl.SSLContext:
        """For an HTTP server: TLS 1.2 and later. Raises TlsError where a file is missing, is no PEM or is encrypted, or
        the key is another certificate's."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key, self._passphrase)
        except (OSError, ssl.SSLError) as error:
            raise TlsError(f"{self.cert} and {self.key} are no certificate and its key: {error}") from error
        if self.client_ca is not None:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ssl.SSLError) as error:
                raise TlsError(f"{self.client_ca} is no certificate of an authority: {error}") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _passphrase(self) -> NoReturn:
        """Called for a key that is encrypted. OpenSSL would ask the terminal, and wait; gRPC takes none."""
        raise TlsError(f"{self.key}: the private key is encrypted, and nobody is asked for its passphrase")
