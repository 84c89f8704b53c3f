"""Reliability 31: no handshake, no call. Certificates are made here."""

import asyncio
import json
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from certificates import Authority
from cryptography.hazmat.primitives import serialization
from scripted_engine import ScriptedEngine
from serving import PATIENCE, serving

from jaxserve.request_errors import EngineUnavailable
from rpc.client import AsyncClient, Client, Credentials
from rpc.security.config import SecurityConfig
from rpc.security.tls import TlsError, TlsFiles
from rpc.server import Server
from rpc.server_config import ServerConfig


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


async def works(server: Server, credentials: Credentials) -> bool:
    """Whether a client gets an answer."""
    async with AsyncClient(f"127.0.0.1:{server.port}", credentials) as client:
        try:
            return len((await client.generate_once("hello", max_tokens=3, timeout=10)).token_ids) == 3
        except EngineUnavailable:
            return False


async def refused_after_it_worked(security: SecurityConfig, good: Credentials, *bad: Credentials) -> None:
    """A server lets `good` in, none of `bad`, and `good` still after those."""
    async with serving(ScriptedEngine(), ServerConfig(grpc_port=0, security=security)) as (server, _):
        assert await works(server, good)
        for credentials in bad:
            assert not await works(server, credentials), credentials
        assert await works(server, good)


async def test_plain_text_and_a_client_of_another_authority_do_not_shake_hands(authority: Authority, tmp_path: Path):
    other = Authority(tmp_path / "other")
    await refused_after_it_worked(authority.server(), authority.client(), Credentials(), other.client())


async def test_a_certificate_that_has_expired_or_names_another_host_is_not_trusted(authority: Authority):
    expired = SecurityConfig(*(None, *authority.issue("expired", lifetime=timedelta(days=-1))))
    elsewhere = SecurityConfig(*(None, *authority.issue("elsewhere", host="elsewhere.example")))
    for security in (expired, elsewhere):
        async with serving(ScriptedEngine(), ServerConfig(grpc_port=0, security=security)) as (server, _):
            assert not await works(server, authority.client())


async def test_mutual_tls_wants_a_certificate_of_its_authority_that_is_valid(authority: Authority, tmp_path: Path):
    other = Authority(tmp_path / "other")

    def showing(pair: tuple[str, str]) -> Credentials:
        return authority.client(client_cert=pair[0], client_key=pair[1])

    await refused_after_it_worked(
        authority.server(tls_client_ca=str(authority.certificate)),
        showing(authority.issue("client")),
        authority.client(),
        showing(other.issue("client")),
        showing(authority.issue("late", lifetime=timedelta(days=-1))),
    )


def test_one_half_of_a_clients_certificate_is_refused_and_does_not_end_the_process(authority: Authority):
    cert, key = authority.issue("client")
    for half in ({"client_cert": cert}, {"client_key": key}):
        with pytest.raises(ValueError, match="client_cert and client_key: both or neither"):
            Client("127.0.0.1:1", authority.client(**half))


async def test_the_plain_client_speaks_tls_too(authority: Authority):
    async with serving(ScriptedEngine(), ServerConfig(grpc_port=0, security=authority.server())) as (server, _):

        def ask() -> str:
            with Client(f"127.0.0.1:{server.port}", authority.client()) as client:
                return client.generate("hello", max_tokens=3).text()

        assert await asyncio.to_thread(ask) == "abc"


async def test_files_that_do_not_belong_together_are_refused_before_the_port_is_bound(authority: Authority):
    cert, _ = authority.issue("one")
    _, key = authority.issue("two")
    server = Server(
        ServerConfig(grpc_port=0, security=SecurityConfig(tls_cert=cert, tls_key=key)), report=lambda _: None
    )
    with pytest.raises(TlsError, match="no certificate and its key"):
        await server.start()
    with pytest.raises(ValueError, match="both or neither"):
        SecurityConfig(tls_cert=cert)
    await server.stop(0.0)


def test_a_private_key_that_is_encrypted_is_refused_and_nobody_is_asked_for_its_passphrase(tmp_path: Path):
    cert, plain = Authority(tmp_path / "authority").issue("server")
    encrypted = tmp_path / "encrypted.key"
    cipher = serialization.BestAvailableEncryption(b"a passphrase")
    key = serialization.load_pem_private_key(Path(plain).read_bytes(), None)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    encrypted.write_bytes(key.private_bytes(encoding, form, cipher))
    for use in (TlsFiles.grpc_credentials, TlsFiles.ssl_context):
        with pytest.raises(TlsError, match=r"encrypted\.key: the private key is encrypted"):
            use(TlsFiles(Path(cert), encrypted))


def test_handshakes_that_fail_write_nothing_among_the_logs(authority: Authority):
    cert, key = authority.issue("server")
    command = [sys.executable, "-m", "jaxserve", "serve", "--grpc-port", "0", "--simulated-step-ms", "1"]
    command += ["--tls-cert", cert, "--tls-key", key]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = json.loads(server.stdout.readline())["port"]
            for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(range(200))):
                with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
                    connection.sendall(garbage)
                    assert connection.recv(1) == b""
            server.terminate()
            _, errors = server.communicate(timeout=PATIENCE)
        finally:
            server.kill()
    assert server.returncode == 0 and "andshake" not in errors, errors


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.test"])
def test_an_address_that_is_not_loopback_needs_keys_and_tls_or_a_word(host: str):
    for security in (SecurityConfig(), SecurityConfig(api_keys="k"), SecurityConfig(tls_cert="c", tls_key="k")):
        with pytest.raises(ValueError, match="is not loopback"):
            ServerConfig(host=host, security=security)
    ServerConfig(host=host, security=SecurityConfig(api_keys="k", tls_cert="c", tls_key="k"))
    ServerConfig(host=host, security=SecurityConfig(tls_client_ca="a", tls_cert="c", tls_key="k"))
    ServerConfig(host=host, security=SecurityConfig(allow_open=True))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_nothing(host: str):
    ServerConfig(host=host)
