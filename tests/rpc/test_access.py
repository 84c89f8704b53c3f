"""Reliability 32 and 33: nothing answers without a key but the documented probes, and tenants do not meet."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
import pytest
from http_serving import exchange, http_serving, post
from scripted_engine import ScriptedEngine, expected_ids
from serving import PATIENCE, eventually, lent, serving
from starlette.applications import Starlette
from starlette.routing import Route

from jaxserve.log import JsonFormatter
from jaxserve.request_errors import TenantBusy
from rpc.client import AsyncClient, Credentials, Forbidden, Unauthenticated
from rpc.http.guard import HttpGuard
from rpc.http.listener import HttpListener
from rpc.security.access import OPEN_PATHS, Access
from rpc.security.config import SecurityConfig
from rpc.security.keys import KeyFile, add_key
from rpc.server import Server
from rpc.server_config import ServerConfig

if TYPE_CHECKING:
    from jaxserve.engine import Engine


class Keys:
    """A key file with two tenants and an admin."""

    def __init__(self, folder: Path):
        self.file = folder / "keys"
        self.acme = add_key(self.file, "acme")
        self.other = add_key(self.file, "other")
        self.admin = add_key(self.file, "ops", is_admin=True)

    @property
    def config(self) -> ServerConfig:
        return ServerConfig(grpc_port=0, security=SecurityConfig(api_keys=str(self.file)))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def client(server: Server, key: str | None) -> AsyncClient:
    return AsyncClient(f"127.0.0.1:{server.port}", Credentials(api_key=key))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Every method that is given to a gRPC server while the test runs, as its path."""
    paths: set[str] = set()
    add = grpc.aio.Server.add_registered_method_handlers

    def note(self: grpc.aio.Server, service: str, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        paths.update(f"/{service}/{method}" for method in handlers)
        add(self, service, handlers)

    monkeypatch.setattr("grpc.aio._server.Server.add_registered_method_handlers", note)
    yield paths


async def status_of(
    channel: grpc.aio.Channel, path: str, headers: list[tuple[str, str]], patience: float = PATIENCE
) -> grpc.StatusCode:
    """The status of a call with an empty message. A call that is let in may go on: then it is cancelled."""
    # Not a stream of requests: a write that comes after the refusal would make the client say INTERNAL of its own.
    call = channel.unary_stream(path)(b"", metadata=headers)
    try:
        async with asyncio.timeout(patience):
            return await call.code()
    except TimeoutError:
        call.cancel()
        return grpc.StatusCode.OK


async def test_every_method_is_refused_without_its_key_but_the_documented_probes(keys: Keys, registered: set[str]):
    async with serving(ScriptedEngine(), keys.config) as (server, _):
        assert {"/jaxserve.v1.Inference/Generate", "/jaxserve.v1.Control/Abort"} < registered
        assert "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo" in registered
        wrong = [
            [],
            [("authorization", f"Bearer {keys.acme}x")],
            [("authorization", f"Bearer {keys.acme[:-1]}")],
            [("authorization", keys.acme)],
            [("authorization", f"Basic {keys.acme}")],
            [("authorization", "Bearer ")],
            [("authorization", f"Bearer {keys.acme}"), ("authorization", f"Bearer {keys.other}")],
            [("x-api-key", keys.acme)],
        ]
        unknown = {"/jaxserve.v1.Inference/NoSuchMethod", "/no.such.Service/Method", "/"}
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            for path in sorted((registered | unknown) - OPEN_PATHS):
                for headers in wrong:
                    assert await status_of(channel, path, headers) is grpc.StatusCode.UNAUTHENTICATED, (path, headers)
                right = await status_of(channel, path, [("authorization", f"Bearer {keys.admin}")], 0.3)
                assert right is not grpc.StatusCode.UNAUTHENTICATED, path
            for path in sorted(registered & OPEN_PATHS):
                assert await status_of(channel, path, [], 0.3) is not grpc.StatusCode.UNAUTHENTICATED, path


async def test_probes_answer_without_a_key_and_generating_needs_one(keys: Keys):
    async with serving(ScriptedEngine(), keys.config) as (server, anonymous):
        assert await anonymous.is_ready()
        with pytest.raises(Unauthenticated):
            await anonymous.generate_once("hello", max_tokens=3)
        async with client(server, keys.acme) as acme:
            assert list((await acme.generate_once("hello", max_tokens=3)).token_ids) == expected_ids(3)
            long = await acme.generate_once("x" * 3000, max_tokens=3)  # submitted from a thread
            assert list(long.token_ids) == expected_ids(3)


async def test_a_key_that_is_taken_from_the_file_opens_nothing_more(keys: Keys):
    async with serving(ScriptedEngine(), keys.config) as (server, _), client(server, keys.acme) as acme:
        await acme.generate_once("hello", max_tokens=3)
        lines = [line for line in keys.file.read_text().splitlines() if not line.startswith("acme")]
        keys.file.write_text("\n".join(lines))
        await eventually(lambda: server.access.keys is not None and server.access.keys.principal_of(keys.acme) is None)
        with pytest.raises(Unauthenticated):
            await acme.generate_once("hello", max_tokens=3)


async def test_a_tenant_aborts_its_own_requests_alone_and_an_admin_any(keys: Keys):
    engine = ScriptedEngine()
    engine.paused.set()
    async with (
        serving(engine, keys.config) as (server, _),
        client(server, keys.acme) as acme,
        client(server, keys.other) as other,
        client(server, keys.admin) as admin,
    ):
        for aborting, succeeds in ((other, False), (acme, True), (admin, True)):
            generation = acme.generate({"prompt": "hello", "id": "mine"}, max_tokens=100)
            reading = asyncio.create_task(generation.text())
            await eventually(lambda: "mine" in engine._active)
            assert await aborting.abort("mine") is succeeds
            if not succeeds:
                await acme.abort("mine")
            await reading
            assert generation.finished is not None and generation.finished.finish_reason == "abort"


async def test_a_request_that_is_still_tokenized_is_its_tenants_to_abort_as_well(keys: Keys):
    engine = ScriptedEngine()
    engine.may_submit.clear()
    async with (
        serving(engine, keys.config) as (server, _),
        client(server, keys.acme) as acme,
        client(server, keys.other) as other,
    ):
        generation = acme.generate({"prompt": "x" * 3000, "id": "mine"})
        reading = asyncio.create_task(generation.text())
        await eventually(lambda: len(server.calls) == 1)
        assert not await other.abort("mine")
        assert await acme.abort("mine")
        engine.may_submit.set()
        await reading


async def test_keys_are_in_no_log_and_no_answer(keys: Keys, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    wrong = "jxs_a-key-that-is-not-known"
    async with http_serving(ScriptedEngine(), replace(keys.config, metrics_port=0)) as (server, address):
        assert server.metrics is not None
        for key in (keys.acme, wrong):
            async with client(server, key) as caller:
                for prompt in ("raise", "break", "hello"):
                    try:
                        await caller.generate_once(prompt, max_tokens=3)
                    except Exception as error:
                        assert key not in str(error)
            bearer = f"authorization: Bearer {key}"
            for prompt in ("raise", "break", "hello", 5):
                answer = await post(address, "/v1/completions", {"prompt": prompt, "max_tokens": 3}, bearer)
                assert key.encode() not in answer.body
            for where in (address, f"127.0.0.1:{server.metrics.port}"):
                for head in (
                    f"GET /metrics HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{bearer}",
                    f"GET /metrics?api_key={key} HTTP/1.1\r\nhost: test\r\nconnection: close",
                    f"GET /metrics HTTP/1.1\r\nhost: test\r\n{bearer}\r\n{bearer}x",
                    f"GET /metrics HTTP/1.1\r\nhost: test\r\n{bearer}\r\nx: {'y' * 40_000}",  # 431
                    f"NO SUCH {bearer}",  # 400
                ):
                    answer = await exchange(where, f"{head}\r\n\r\n".encode())
                    assert key.encode() not in answer.body
        keys.file.write_text(f"acme {keys.acme}\n")  # a key where its hash belongs
        await eventually(lambda: "stay as they were" in caplog.text)
        assert server.access.decide("/v1/models", f"Bearer {keys.acme}").tenant == "acme"
    told = "\n".join(JsonFormatter().format(record) for record in caplog.records) + caplog.text
    assert told.count("a defect") >= 2 and "a scripted failure" in told  # something was logged, of each protocol
    for key in (keys.acme, wrong):
        assert key not in told and key not in repr(Credentials(api_key=key))


@pytest.mark.parametrize("key", ["jxs_secret\n", "jxs_sécret", "jxs_sec\0ret", b"jxs_secret"])
def test_a_key_that_no_header_can_carry_is_refused_by_name_and_not_quoted(key: str):
    with pytest.raises(ValueError, match="api_key: must be printable ASCII") as refusal:
        Credentials(api_key=key)
    assert "jxs" not in str(refusal.value)


def test_only_an_admin_is_let_onto_admin_paths(keys: Keys):
    access = Access(KeyFile(keys.file))
    assert access.decide("/admin/drain", f"bearer {keys.admin}").is_admin
    for path in ("/admin/drain", "/jaxserve.v1.Control/Profile"):
        with pytest.raises(Forbidden):
            access.decide(path, f"Bearer {keys.acme}")
    assert Access(None).decide("/admin/drain", None).is_admin


def test_an_open_path_makes_nobody_a_tenant(keys: Keys):
    principal = Access(KeyFile(keys.file)).decide("/health", f"Bearer {keys.admin}")
    assert (principal.tenant, principal.is_admin) == ("", False)


async def test_prefixes_are_shared_within_a_tenant_and_never_across(keys: Keys, engine: "Engine"):
    prompt = {"token_ids": list(range(300, 364))}
    async with (
        serving(lent(engine), keys.config) as (server, _),
        client(server, keys.acme) as acme,
        client(server, keys.other) as other,
    ):

        async def cached(who: AsyncClient, **fields: str) -> int:
            return (await who.generate_once({**prompt, **fields}, max_tokens=1)).usage.cached_tokens

        assert await cached(acme) == 0
        assert await cached(acme) >= 48
        assert await cached(other) == 0
        assert await cached(other, cache_salt="acme\0") == 0
        assert await cached(acme, cache_salt="apart") == 0
        assert await cached(other) >= 48


async def test_a_tenant_is_bounded_and_the_others_go_on(keys: Keys):
    from jaxserve.engine import Engine

    with Engine(simulated_step_ms=1.0, slots=4, max_context=256, max_tenant_requests=3) as engine:
        async with (
            serving(lent(engine), keys.config) as (server, _),
            client(server, keys.acme) as acme,
            client(server, keys.other) as other,
        ):
            open_ = [acme.generate({"token_ids": [300], "ignore_eos": True}) for _ in range(3)]
            reading = [asyncio.create_task(generation.text()) for generation in open_]
            await eventually(lambda: len(engine._requests) == 3)
            with pytest.raises(TenantBusy, match="tenant") as refused:
                await acme.generate_once({"token_ids": [300]}, max_tokens=2)
            assert refused.value.limit == 3
            assert (await other.generate_once({"token_ids": [300]}, max_tokens=2)).finish_reason == "length"
            for generation in open_:
                generation.cancel()
            await asyncio.gather(*reading)
            await eventually(lambda: len(engine._requests) == 0)
            assert (await acme.generate_once({"token_ids": [300]}, max_tokens=2)).finish_reason == "length"


async def http_status(address: str, method: str, path: str, *headers: str) -> int:
    """The status of an answer, which may go on for ever."""
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write("\r\n".join([f"{method} {path} HTTP/1.1", "host: test", *headers, "", ""]).encode())
    async with asyncio.timeout(PATIENCE):
        status = int((await reader.readline()).split()[1])
    writer.transport.abort()
    return status


def routes_of(listener: HttpListener) -> set[tuple[str, str]]:
    """Method and path of every route, from the application itself: one that is added tomorrow is among them."""
    guard = listener._server.config.app
    assert isinstance(guard, HttpGuard) and isinstance(guard._app, Starlette)
    found: set[tuple[str, str]] = set()
    for route in guard._app.routes:
        assert isinstance(route, Route), "neither mounts nor sockets, whose paths would not be seen here"
        # A route that names no methods takes any.
        found |= {(method, route.path.replace("{model:path}", "scripted")) for method in route.methods or ("POST",)}
    return found


async def test_every_http_route_of_either_port_is_refused_without_its_key_but_the_documented_probes(keys: Keys):
    wrong = (
        (),
        (f"authorization: Bearer {keys.acme}x",),
        (f"authorization: Bearer {keys.acme[:-1]}",),
        (f"authorization: {keys.acme}",),
        (f"authorization: Basic {keys.acme}",),
        ("authorization: Bearer ",),
        (f"authorization: Bearer {keys.acme}", f"authorization: Bearer {keys.other}"),
        (f"x-api-key: {keys.acme}",),
        (f"cookie: authorization=Bearer {keys.acme}",),
    )
    async with http_serving(ScriptedEngine(), replace(keys.config, metrics_port=0)) as (server, address):
        assert server.http is not None and server.metrics is not None
        assert {"/v1/completions", "/v1/chat/completions", "/metrics", "/health"} < {
            path for _, path in routes_of(server.http)
        }
        unknown = {("GET", "/no/such/path"), ("POST", "/v1/models/../completions"), ("OPTIONS", "/metrics")}
        unknown |= {("GET", f"/metrics?api_key={keys.acme}"), ("GET", "//health"), ("GET", "/health/")}
        for listener in (server.http, server.metrics):
            where = f"127.0.0.1:{listener.port}"
            open_paths: set[str] = set()
            for method, path in sorted(routes_of(listener) | unknown | {("GET", "/")}):
                statuses = {await http_status(where, method, path, *headers) for headers in wrong}
                if statuses != {401}:
                    assert 401 not in statuses, (method, path, statuses)
                    open_paths.add(path)
                right = f"authorization: Bearer {keys.admin}"
                assert await http_status(where, method, path, right, "content-length: 0") != 401, (method, path)
            assert open_paths == {"/", "/health"}
        assert await http_status(address, "GET", "/health") == 200
