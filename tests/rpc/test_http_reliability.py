"""Overload, bad input, hostile bytes, slow readers and signals over HTTP, with the figures that are promised."""

import asyncio
import gzip
import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
from certificates import Authority
from http_serving import RawAnswer, exchange, http_serving, openai_client, post, request_bytes
from running_time import RunningTime, forget_peak, peak_resident_bytes, resident_bytes
from scripted_engine import ScriptedEngine
from serving import PATIENCE, ServerProcess, back_to_the_start, eventually, server_process

from rpc.http.lingering import LINGER_BYTES
from rpc.security.config import SecurityConfig
from rpc.security.keys import add_key
from rpc.server_config import ServerConfig

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODIES = {COMPLETIONS: {"prompt": "hi"}, CHAT: {"messages": [{"role": "user", "content": "hi"}]}}

GET_HEALTH = b"GET /health HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"


@pytest.mark.asyncio
async def test_100_requests_past_the_queues_limit_get_429_at_once_and_health_answers_all_the_while() -> None:
    engine = ScriptedEngine(slots=8, max_waiting=16)
    engine.paused.set()
    async with http_serving(engine) as (server, address):
        accepted = [asyncio.ensure_future(post(address, COMPLETIONS, {"prompt": "hi", "max_tokens": 3}))]
        accepted += [
            asyncio.ensure_future(post(address, COMPLETIONS, {"prompt": "x", "max_tokens": 3})) for _ in range(23)
        ]
        await eventually(lambda: engine.submitted == 24)
        with RunningTime() as clock:

            async def refused() -> tuple[RawAnswer, float]:
                began = clock.seconds
                return await post(address, COMPLETIONS, BODIES[COMPLETIONS]), clock.seconds - began

            answers: list[tuple[RawAnswer, float]] = []
            for _ in range(10):
                answers += await asyncio.gather(*(refused() for _ in range(10)))
                assert (await exchange(address, GET_HEALTH)).status == 200
        engine.paused.clear()
        assert {answer.status for answer, _ in answers} == {429}
        assert {answer.headers["retry-after"] for answer, _ in answers} == {"1"}
        assert {answer.error()["code"] for answer, _ in answers} == {"queue_full"}
        assert max(seconds for _, seconds in answers) <= 0.1
        assert {answer.status for answer in await asyncio.gather(*accepted)} == {200}
        assert engine.submitted == 24
        await back_to_the_start(engine, server)


OUT_OF_RANGE = [
    *[("max_tokens", value) for value in (-1, 0, 2**31, 1.5, "4", True)],
    *[("temperature", value) for value in (-0.1, 101, "hot", [1], 10**400)],
    *[("top_p", value) for value in (0, -1, 1.5, {})],
    *[("top_k", value) for value in (-2, 2**31)],
    *[("n", value) for value in (0, -1, 10**9)],
    *[("min_p", value) for value in (-1, 2)],
    *[("seed", value) for value in (-1, 2**32, 10**400)],
    *[
        ("logit_bias", value)
        for value in ({"256": 1}, {"x": 1}, {"1": 101}, {"1": 10**400}, [1], dict.fromkeys(map(str, range(300)), 0))
    ],
    *[("stop", value) for value in ([""], ["x" * 257], ["x"] * 17, 5, [None])],
    *[("stop_token_ids", value) for value in ([-1], [256], ["a"], 3)],
    *[("presence_penalty", value) for value in (-3, "x")],
    ("min_tokens", -1),
    ("repetition_penalty", 0),
    ("priority", 2**40),
    ("cache_salt", 7),
    ("stream", "yes"),
    ("ignore_eos", 1),
    ("return_token_ids", 3),
    ("user", 3),
    ("response_format", {"type": "xml"}),
]
OF_COMPLETIONS = [
    *[
        ("prompt", value)
        for value in ("", [], None, 5, [1, "a"], [[]], [[1], "a"], [300], [-1], [[300], [1]], ["x"] * 200)
    ],
    *[("logprobs", value) for value in (-1, 21, True, "2")],
    ("best_of", 4),
    ("echo", True),
    ("suffix", "end"),
]


@pytest.mark.asyncio
async def test_values_out_of_range_are_refused_by_name_at_once_and_nothing_is_queued() -> None:
    engine = ScriptedEngine()
    async with http_serving(engine) as (server, address):
        with RunningTime() as clock:
            for path, cases in ((COMPLETIONS, OUT_OF_RANGE + OF_COMPLETIONS), (CHAT, OUT_OF_RANGE)):
                for name, value in cases:
                    began = clock.seconds
                    answer = await post(address, path, {**BODIES[path], name: value})
                    assert answer.status == 400, (path, name, value, answer.body)
                    assert answer.error()["param"] == name, (name, value, answer.body)
                    assert clock.seconds - began <= 0.05
        assert engine.submitted == 0
        assert len(server.calls) == 0


@pytest.mark.asyncio
async def test_not_a_number_and_infinities_are_no_json() -> None:
    async with http_serving(ScriptedEngine()) as (_, address):
        for word in (b"NaN", b"Infinity", b"-Infinity"):
            answer = await exchange(address, request_bytes(COMPLETIONS, b'{"prompt": "a", "temperature": %s}' % word))
            assert (answer.status, answer.error()["code"]) == (400, "invalid_json")
        answer = await exchange(address, request_bytes(COMPLETIONS, b'{"prompt": "a", "temperature": 1e999}'))
        assert (answer.status, answer.error()["param"]) == (400, "temperature")


@pytest.mark.asyncio
async def test_text_that_is_not_unicode_is_refused_and_nul_and_any_script_are_taken() -> None:
    async with http_serving(ScriptedEngine()) as (_, address):
        for body in (b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xed\xa0\x80"}', '{"prompt": "a"}'.encode("utf-16")):
            answer = await exchange(address, request_bytes(COMPLETIONS, body))
            assert (answer.status, answer.error()["code"]) == (400, "invalid_json")
        for field in ("prompt", "stop", "cache_salt", "user"):
            body = b'{"prompt": "a", "max_tokens": 1, "%s": "\\ud83d"}' % field.encode()
            answer = await exchange(address, request_bytes(COMPLETIONS, body))
            assert (answer.status, answer.error()["param"]) == (400, field)
        for prompt in ("a\0b", "Grüße, 世界", "😀", "\u202e"):
            answer = await post(address, COMPLETIONS, {"prompt": prompt, "max_tokens": 2})
            assert answer.status == 200
            assert json.loads(answer.body)["usage"]["prompt_tokens"] == len(prompt.encode())


def test_hostile_bodies_and_heads_are_refused_and_cost_no_memory() -> None:
    nested = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    schema = b'{"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": %s}}}' % (
        b'{"items":' * 100_000 + b"{}" + b"}" * 100_000
    )
    bomb = gzip.compress(b"0" * (64 << 20))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n".encode()
    no_json = head.replace(b"application/json", b"text/plain") + b"connection: close\r\ncontent-length: 2\r\n\r\n{}"
    cases = [
        (400, request_bytes(COMPLETIONS, nested)),
        (400, request_bytes(COMPLETIONS, schema)),
        (415, request_bytes(COMPLETIONS, bomb, "content-encoding: gzip")),
        (413, head + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\n0\r\n" * (3 << 20) + b"0\r\n\r\n"),
        (413, head + b"content-length: 100000000\r\n\r\n"),
        (415, no_json),
        (431, head + b"a: " + b"x" * (1 << 20) + b"\r\n\r\n"),
        (431, head + b"".join(b"h%d: " % n + b"y" * 1000 + b"\r\n" for n in range(100)) + b"\r\n"),
        (431, b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: test\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 this is TLS\r\n\r\n"),
        (400, request_bytes(COMPLETIONS, b"[1]")),
        (400, request_bytes(COMPLETIONS, b'{"prompt": ' + b"9" * 5000 + b"}")),
        (400, request_bytes(COMPLETIONS, b"")),
    ]

    async def scenario(server: ServerProcess) -> None:
        address = server.http_address
        for _ in range(3):
            assert (await post(address, COMPLETIONS, {"prompt": "a" * 4000, "max_tokens": 1})).status == 200
        before = resident_bytes(server.process.pid)
        for status, data in cases:
            forget_peak(server.process.pid)
            answer = await exchange(address, data)
            assert answer.status == status, (status, data[:80], answer)
            grown = peak_resident_bytes(server.process.pid) - before
            assert grown <= 16 << 20, (status, data[:80], grown)
        assert (await post(address, COMPLETIONS, {"prompt": "still", "max_tokens": 3})).status == 200

    with server_process("def engine_factory(): return ScriptedEngine(max_context=8192)", http=True) as server:
        server.report("ready")
        asyncio.run(scenario(server))


@pytest.mark.asyncio
async def test_a_body_past_the_limit_is_refused_with_413_however_it_is_sent_and_the_client_reads_so() -> None:
    """Also one that cannot stop sending: a connection closed with bytes unread is reset, and the answer lost."""
    body = json.dumps({"messages": [{"role": "user", "content": "x" * (19 << 20)}], "unknown": True}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n".encode()
    sized = head + b"content-length: %d\r\n" % len(body)
    pieces = (body[start : start + 65536] for start in range(0, len(body), 65536))
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    engine = ScriptedEngine()
    async with http_serving(engine) as (server, address):
        for data in (
            sized + b"\r\n" + body,
            head + b"transfer-encoding: chunked\r\n\r\n" + chunked,
            sized + b"expect: 100-continue\r\n\r\n",  # the body is not asked for
            sized + b"expect: 100-continue\r\n\r\n" + body,
            sized + b"\r\n" + body + GET_HEALTH,  # what follows a refusal is not answered
        ):
            answer = await exchange(address, data)
            assert (answer.status, answer.error()["code"]) == (413, "request_too_large")
            assert answer.headers["connection"] == "close"
        assert engine.submitted == 0
        async with openai_client(address) as client:
            with pytest.raises(openai.APIStatusError) as large:
                await client.completions.create(model="scripted", prompt=body.decode())
            assert large.value.status_code == 413
            assert (await client.completions.create(model="scripted", prompt="x", max_tokens=2)).choices[0].text == "ab"
        assert server.http is not None
        await eventually(lambda: server.http is not None and not server.http.connections)


@pytest.mark.asyncio
async def test_a_tunnel_is_refused_and_holds_up_nobody() -> None:
    """CONNECT is an upgrade for the parser, whatever its headers say."""
    async with http_serving(ScriptedEngine()) as (_, address):
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"CONNECT other:443 HTTP/1.1\r\nhost: other:443\r\n\r\n")
        status = await asyncio.wait_for(reader.readline(), PATIENCE)
        assert status.split()[1] in (b"400", b"404", b"405"), status
        writer.close()
        assert (await exchange(address, GET_HEALTH)).status == 200


@pytest.mark.asyncio
async def test_a_request_that_asks_for_http2_is_answered_as_it_is() -> None:
    """Java's HttpClient asks so in its first request to a server."""
    wish = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__")
    asked = request_bytes(COMPLETIONS, b'{"prompt": "a", "max_tokens": 3}', *wish)
    open_ended = asked.replace(b"connection: close\r\n", b"")
    get = b"GET /health HTTP/1.1\r\nhost: test\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    async with http_serving(ScriptedEngine()) as (_, address):
        assert (await exchange(address, asked)).status == 200
        assert (await exchange(address, get.replace(b"/health", b"http://["))).status == 400
        several = await exchange(address, open_ended + get * 50 + open_ended + GET_HEALTH)
        assert several.status == 200
        assert several.body.count(b"HTTP/1.1 200 OK") == 52
        assert several.body.count(b'"abc"') == 2
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for part in (asked[:-40], asked[-40:-20], asked[-20:]):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)
        assert b'"abc"' in await reader.read()
        writer.close()


@pytest.mark.asyncio
async def test_a_client_that_never_stops_sending_is_reset() -> None:
    async with http_serving(ScriptedEngine()) as (server, address):
        host, port = address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: test\r\ntransfer-encoding: chunked\r\n\r\n".encode())
        with pytest.raises(ConnectionError):
            for _ in range(3 * LINGER_BYTES >> 20):
                writer.write(b"100000\r\n%s\r\n" % bytes(1 << 20))
                await writer.drain()
        assert server.http is not None
        await eventually(lambda: server.http is not None and not server.http.connections)
        writer.close()


def with_small_buffer(address: str) -> socket.socket:
    """A connection that takes little of what is not read."""
    host, port = address.split(":")
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.connect((host, int(port)))
    return made


@contextmanager
def asks_and_reads_nothing(address: str, path: str, body: object) -> Iterator[None]:
    """A client that sends one request."""
    with with_small_buffer(address) as stuck:
        stuck.sendall(request_bytes(path, json.dumps(body).encode()))
        yield


@pytest.mark.asyncio
async def test_a_reader_that_reads_nothing_is_cut_off_and_its_pages_are_free() -> None:
    engine = ScriptedEngine(step_time=0.0, max_context=1 << 22, stream_buffer_tokens=1 << 20)
    async with http_serving(engine, ServerConfig(stall_limit=0.5)) as (server, address):
        with asks_and_reads_nothing(address, COMPLETIONS, {"prompt": "x", "stream": True}):
            await eventually(lambda: engine.submitted == 1)
            await back_to_the_start(engine, server)
            assert (await post(address, COMPLETIONS, {"prompt": "y", "max_tokens": 3})).status == 200
            assert server.http is not None
            await eventually(lambda: server.http is not None and not server.http.connections)


@pytest.mark.asyncio
async def test_a_stream_whose_last_words_nobody_reads_ends_at_the_stall_limit() -> None:
    engine = ScriptedEngine(text_size=16 << 10)
    engine.tokenizer.chat_template = "{{ tools }}<tool_call>"
    # A forced call is shown at its end: one chunk that fills every buffer, and then the end of the stream.
    tools = [{"type": "function", "function": {"name": "f"}}]
    asked = {**BODIES[CHAT], "max_tokens": 64, "stream": True, "tools": tools, "tool_choice": "required"}
    async with http_serving(engine, ServerConfig(stall_limit=0.5)) as (server, address):
        with asks_and_reads_nothing(address, CHAT, asked):
            await eventually(lambda: engine.submitted == 1)
            await back_to_the_start(engine, server)
            await eventually(lambda: server.http is not None and not server.http.connections)


@pytest.mark.asyncio
async def test_a_drain_leaves_a_slow_reader_the_grace_to_take_the_end_of_its_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rpc.http.listener.FLUSH_TIME", 0.0)
    loop = asyncio.get_running_loop()
    async with http_serving(ScriptedEngine(step_time=0.0, text_size=2000)) as (server, address):
        with with_small_buffer(address) as reader:
            reader.setblocking(False)
            await loop.sock_sendall(reader, request_bytes(COMPLETIONS, b'{"prompt": "x", "max_tokens": 200}'))
            answer = bytearray(await loop.sock_recv(reader, 4096))
            stopping = asyncio.create_task(server.stop(grace=PATIENCE))
            while len(server.calls):
                answer += await loop.sock_recv(reader, 4096)
            # The server has given all away, and the buffers on the way are full of it.
            listener = server.http
            assert listener is not None
            await eventually(lambda: listener._ticking is None)
            await asyncio.wait((stopping,), timeout=0.2)
            while piece := await loop.sock_recv(reader, 1 << 16):
                answer += piece
        assert await stopping
    head, _, whole = bytes(answer).partition(b"\r\n\r\n")
    assert f"content-length: {len(whole)}".encode() in head


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.asyncio
async def test_who_reads_nothing_of_a_whole_answer_keeps_no_connection(
    tls: bool, connection: str, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "authority")
    security = authority.server() if tls else SecurityConfig()
    trusting = ssl.create_default_context(cafile=str(authority.certificate))
    secure = {"ssl": trusting, "server_hostname": "localhost"} if tls else {}
    engine = ScriptedEngine(text_size=16 << 10)
    asked = request_bytes(COMPLETIONS, b'{"prompt": "x", "max_tokens": 128}')
    asked = asked.replace(b"connection: close", b"connection: %s" % connection.encode())
    async with http_serving(engine, ServerConfig(stall_limit=0.5, security=security)) as (server, address):
        _, writer = await asyncio.open_connection(sock=with_small_buffer(address), **secure)
        writer.write(asked)
        await eventually(lambda: engine.submitted == 1)
        await eventually(lambda: server.http is not None and not server.http.connections)
        await back_to_the_start(engine, server)
        writer.transport.abort()


@pytest.mark.asyncio
async def test_every_route_but_the_probe_and_the_page_needs_a_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    key = add_key(keys, "acme")
    async with http_serving(ScriptedEngine(), ServerConfig(security=SecurityConfig(api_keys=str(keys)))) as (
        _,
        address,
    ):
        closed = (
            "/v1/models",
            "/v1/models/scripted",
            "/metrics",
            "/live",
            "/openapi.json",
            "/nothing",
            COMPLETIONS,
            CHAT,
        )
        for path in closed:
            for authorization in ("", "authorization: Bearer wrong\r\n", f"authorization: Basic {key}\r\n"):
                get = f"GET {path} HTTP/1.1\r\nhost: test\r\n{authorization}\r\n".encode()
                answer = await exchange(address, get)
                assert (answer.status, answer.error()["code"]) == (401, "invalid_api_key")
        for path in ("/health", "/"):
            assert (await exchange(address, f"GET {path} HTTP/1.1\r\nconnection: close\r\n\r\n".encode())).status == 200
        async with openai_client(address) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.completions.create(model="scripted", prompt="x")
            known = client.with_options(api_key=key)
            assert (await known.completions.create(model="scripted", prompt="x", max_tokens=2)).choices[0].text == "ab"
