"""A stream taken up again after a broken connection: no token is lost or repeated, and nothing is kept for ever."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from breaking_proxy import BreakingProxy
from serving import back_to_the_start, eventually, lent, serving

from jaxserve.core.messages import Submit
from jaxserve.engine import Engine
from jaxserve.events import Delta, Finished, FinishReason, Started
from jaxserve.front.admission import Admission
from jaxserve.request_errors import InvalidRequest, StreamNotFound, StreamTaken
from rpc import call_runner
from rpc.client import AsyncClient, Client, Credentials, Unauthenticated
from rpc.convert import event_from_proto
from rpc.security.config import SecurityConfig
from rpc.security.keys import add_key
from rpc.server import Server
from rpc.server_config import ServerConfig
from rpc.v1 import jaxserve_pb2 as pb
from rpc.v1 import jaxserve_pb2_grpc

pytestmark = pytest.mark.asyncio

PROMPT = {"token_ids": list(range(300, 310))}


@pytest.fixture(scope="module")
def simulated() -> Iterator[Engine]:
    with Engine(simulated_step_ms=4.0, slots=8, max_context=1024, resumable_streams=4) as engine:
        yield engine


@asynccontextmanager
async def served(engine: Engine, config: ServerConfig | None = None) -> AsyncIterator[tuple[Server, AsyncClient]]:
    async with serving(lent(engine), config) as (server, client):
        yield server, client
    await back_to_the_start(engine)


def fields(tokens: int = 60, **more: object) -> dict[str, Any]:
    return {"max_tokens": tokens, "ignore_eos": True, "resumable": True, **more}


async def broken_after(client: AsyncClient, tokens: int, request: dict[str, Any]) -> tuple[str, list[Delta]]:
    """Reads a stream until so many tokens have come, and lets its connection go without a word to the server."""
    generation = client.generate(PROMPT, **request)
    deltas: list[Delta] = []
    async for response in generation._call:
        event = event_from_proto(response)
        if isinstance(event, Delta):
            deltas.append(event)
        if sum(len(delta.token_ids) for delta in deltas) >= tokens:
            break
    generation._call.cancel()
    return generation.request_id, deltas


def of_index(deltas: list[Delta], index: int) -> tuple[tuple[int, ...], str]:
    own = [delta for delta in deltas if delta.index == index]
    return tuple(token for delta in own for token in delta.token_ids), "".join(delta.text for delta in own)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_goes_on_where_it_broke(simulated: Engine, n: int) -> None:
    (whole,) = await asyncio.to_thread(lambda: simulated.generate([PROMPT], max_tokens=60, ignore_eos=True, n=n))
    async with served(simulated) as (_, client):
        request_id, deltas = await broken_after(client, 10, fields(n=n))
        assert simulated.loads().running > 0
        received = sum(len(delta.token_ids) for delta in deltas)
        attached = client.attach(request_id, received)
        events = [event async for event in attached.events()]
        assert isinstance(events[0], Started)
        assert sorted(event.index for event in events if isinstance(event, Finished)) == list(range(n))
        deltas += [event for event in events if isinstance(event, Delta)]
    for output in whole.outputs:
        assert of_index(deltas, output.index) == (output.token_ids, output.text)


def flat(deltas: list[Delta]) -> list[tuple[int, int]]:
    return [(delta.index, token) for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_can_be_had_again_from_every_token_while_it_runs_and_after(simulated: Engine, n: int) -> None:
    async with served(simulated) as (_, client):
        request_id, deltas = await broken_after(client, 12, fields(80, n=n))
        begun = flat(deltas)
        for start in range(len(begun) + 1):
            again, seen = client.attach(request_id, start), list[tuple[int, int]]()
            async with aclosing(again.events()) as events:
                while len(seen) <= len(begun) - start:
                    event = await anext(events)
                    seen += flat([event]) if isinstance(event, Delta) else []
            assert seen[: len(begun) - start] == begun[start:]
        whole = client.attach(request_id)
        tokens = flat([delta async for delta in whole])
        assert (await client.loads()).resumable_streams == simulated.loads().resumable_streams > 0
        assert tokens[: len(begun)] == begun and len(tokens) == 80 * n
        for start in range(len(tokens) + 1):
            again = client.attach(request_id, start)
            events = [event async for event in again.events()]
            assert flat([event for event in events if isinstance(event, Delta)]) == tokens[start:]
            assert sorted(event.index for event in events if isinstance(event, Finished)) == list(range(n))
            assert again.finished == whole.finished and again.tokens == len(tokens)
        for beyond in (len(tokens) + 1, 2**62, -1, -(2**62)):
            with pytest.raises(InvalidRequest, match=re.escape(f"must be in [0, {len(tokens)}]")) as error:
                await client.attach(request_id, beyond).text()
            assert error.value.field == "from_token"


async def test_what_is_not_kept_is_not_found(simulated: Engine) -> None:
    async with served(simulated) as (_, client):
        ordinary = client.generate(PROMPT, max_tokens=3, ignore_eos=True)
        await ordinary.text()
        for request_id in ("unknown", ordinary.request_id):
            with pytest.raises(StreamNotFound):
                await client.attach(request_id).text()
        with pytest.raises(InvalidRequest) as error:
            await client.generate(PROMPT, resumable=True, return_token_ids=False).text()
        assert error.value.field == "resumable"


async def test_the_second_reader_takes_over_from_the_first_and_the_request_goes_on(simulated: Engine) -> None:
    async with served(simulated) as (_, client):
        first = client.generate(PROMPT, **fields(200))
        reading = first.events()
        await anext(reading)
        second = client.attach(first.request_id)
        with pytest.raises(StreamTaken):
            async for _ in reading:
                await asyncio.sleep(0)
        assert len(flat([delta async for delta in second])) == 200
        assert second.finished is not None and second.finished.finish_reason is FinishReason.LENGTH


async def test_leaving_a_request_aborts_it_and_leaving_an_attached_stream_does_not(simulated: Engine) -> None:
    async with served(simulated) as (_, client):
        request_id, _ = await broken_after(client, 1, fields(60))
        async for _ in client.attach(request_id):
            break
        assert len(flat([delta async for delta in client.attach(request_id)])) == 60
        generation = client.generate(PROMPT, **fields(900, n=2))
        async with aclosing(generation.events()) as events:
            await anext(events)
        await back_to_the_start(simulated)
        left = client.attach(generation.request_id)
        assert [event.finish_reason async for event in left.events() if isinstance(event, Finished)] == ["abort"] * 2


async def test_only_the_tenant_of_a_stream_can_take_it_up(simulated: Engine, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    keys = {name: add_key(file, name) for name in ("mine", "other")} | {"ops": add_key(file, "ops", is_admin=True)}
    config = ServerConfig(grpc_port=0, security=SecurityConfig(api_keys=str(file)))
    async with served(simulated, config) as (server, nobody):
        clients = {name: AsyncClient(f"127.0.0.1:{server.port}", Credentials(key)) for name, key in keys.items()}
        request_id, deltas = await broken_after(clients["mine"], 3, fields(60))
        for name in ("other", "ops"):
            with pytest.raises(StreamNotFound) as running:
                await clients[name].attach(request_id).text()
            with pytest.raises(StreamNotFound) as unknown:
                await clients[name].attach("unknown").text()
            assert str(running.value).replace(request_id, "unknown") == str(unknown.value)  # not even that there is one
        with pytest.raises(Unauthenticated):
            await nobody.attach(request_id).text()
        whole = flat([delta async for delta in clients["mine"].attach(request_id)])
        assert len(whole) == 60 and whole[: len(flat(deltas))] == flat(deltas)
        # The same id of another tenant is another stream.
        await clients["other"].generate({**PROMPT, "request_id": request_id}, **fields(7)).text()
        assert len(flat([delta async for delta in clients["other"].attach(request_id)])) == 7
        assert flat([delta async for delta in clients["mine"].attach(request_id)]) == whole
        for client in clients.values():
            await client.close()


async def test_a_request_that_nobody_takes_up_is_aborted_and_forgotten_and_an_ended_one_forgotten() -> None:
    with Engine(simulated_step_ms=2.0, slots=2, max_context=4096, resumable_seconds=0.5) as engine:
        async with served(engine) as (_, client), grpc.aio.insecure_channel(client.address) as channel:
            ended = client.generate(PROMPT, **fields(3))
            await ended.text()
            request_id, _ = await broken_after(client, 5, fields(4000))
            assert await client.attach(ended.request_id).text()
            await eventually(lambda: engine.loads().running == 0)
            for name in (request_id, ended.request_id):
                while (code := await code_of(channel, name)) is grpc.StatusCode.OK:
                    await asyncio.sleep(0.6)  # an attempt begins the time anew
                assert code is grpc.StatusCode.NOT_FOUND
                with pytest.raises(StreamNotFound, match=r"ended or was left more than 0\.5 s ago"):
                    await client.attach(name).text()


async def code_of(channel: grpc.aio.Channel, request_id: str) -> grpc.StatusCode:
    call = jaxserve_pb2_grpc.InferenceStub(channel).Attach(pb.AttachRequest(request_id=request_id))
    with suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await call.code()


async def test_the_blocking_client_attaches_as_the_other_does(simulated: Engine) -> None:
    def run(address: str) -> None:
        with Client(address) as client:
            generation = client.generate(PROMPT, **fields(40))
            reading = generation.events()
            while generation.tokens < 5:
                next(reading)
            attached = client.attach(generation.request_id, generation.tokens)
            begun = generation.tokens
            assert len(flat(list(attached))) == 40 - begun
            with pytest.raises(StreamTaken):
                for _ in reading:
                    pass
            assert attached.tokens == 40 and attached.finished is not None
            assert attached.finished.finish_reason is FinishReason.LENGTH
            for start in (0, 39, 40):
                assert len(flat(list(client.attach(generation.request_id, start)))) == 40 - start
            with pytest.raises(InvalidRequest):
                client.attach(generation.request_id, 41).text()
            with pytest.raises(StreamNotFound):
                client.attach("unknown").text()
            # Leaving and cancelling end a request of its own.
            left, cancelled = client.generate(PROMPT, **fields(900)), client.generate(PROMPT, **fields(900))
            for _ in left:
                break
            for _ in cancelled:
                cancelled.cancel()
            for each in (left, cancelled):
                again = client.attach(each.request_id)
                again.text()
                assert again.finished is not None and again.finished.finish_reason is FinishReason.ABORT

    async with served(simulated) as (_, client):
        await asyncio.to_thread(run, client.address)


async def test_the_client_takes_its_stream_up_by_itself(simulated: Engine) -> None:
    (whole,) = await asyncio.to_thread(lambda: simulated.generate([PROMPT], max_tokens=150, ignore_eos=True))
    async with served(simulated) as (server, _), BreakingProxy(server.port) as proxy:
        async with AsyncClient(proxy.address) as client:
            generation = client.generate(PROMPT, **fields(150))
            tokens: list[int] = []
            text: list[str] = []
            cuts = 0
            async for delta in generation:
                tokens += delta.token_ids
                text.append(delta.text)
                if len(tokens) >= 30 * (cuts + 1) and cuts < 3:
                    cuts += 1
                    proxy.cut()
        assert cuts == 3
        assert tuple(tokens) == whole.token_ids
        assert "".join(text) == whole.text
        assert generation.finished is not None


@pytest.fixture
def slow_tokenizing(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """That a prompt is being tokenized, and that it may come to its end."""
    prepare, reached, may_go_on = Admission.prepare, threading.Event(), threading.Event()

    def slow(self: Admission, *args: Any) -> Submit:
        reached.set()
        may_go_on.wait(60)
        return prepare(self, *args)

    monkeypatch.setattr(Admission, "prepare", slow)
    monkeypatch.setattr(call_runner, "INLINE_TOKENS", 0)
    return reached, may_go_on


def is_accepted(engine: Engine, request_id: str) -> bool:
    """Whether its stream may be taken up."""
    stream = engine._kept._streams.get(("", request_id))
    return stream is not None and stream.is_accepted


async def test_leaving_a_request_while_its_prompt_is_tokenized_aborts_it(
    simulated: Engine, slow_tokenizing: tuple[threading.Event, threading.Event]
) -> None:
    reached, may_go_on = slow_tokenizing
    async with served(simulated) as (server, client):
        generation = client.generate(PROMPT, **fields(900))
        reading = asyncio.create_task(generation.text())
        await asyncio.to_thread(reached.wait)
        reading.cancel()
        await asyncio.wait([reading])
        await eventually(lambda: len(server.calls) == 0)
        may_go_on.set()
        await eventually(lambda: is_accepted(simulated, generation.request_id))
        attached = client.attach(generation.request_id)
        await attached.text()
        assert attached.finished is not None and attached.finished.finish_reason is FinishReason.ABORT


async def test_a_connection_that_breaks_while_a_prompt_is_tokenized_costs_no_token(
    simulated: Engine, slow_tokenizing: tuple[threading.Event, threading.Event]
) -> None:
    reached, may_go_on = slow_tokenizing
    async with served(simulated) as (server, client):
        generation = client.generate(PROMPT, **fields(20))
        await asyncio.to_thread(reached.wait)
        generation._call.cancel()
        await eventually(lambda: len(server.calls) == 0)
        may_go_on.set()
        await eventually(lambda: is_accepted(simulated, generation.request_id))
        attached = client.attach(generation.request_id)
        assert sum([len(delta.token_ids) async for delta in attached]) == 20
        assert attached.finished is not None and attached.finished.finish_reason is FinishReason.LENGTH


async def test_a_stream_may_be_left_after_its_client_is_closed(simulated: Engine) -> None:
    def leave_blocking(address: str) -> None:
        client = Client(address)
        events = client.generate(PROMPT, **fields(500)).events()
        next(events)
        client.close()
        events.close()

    async with served(simulated) as (_, client):
        await asyncio.to_thread(leave_blocking, client.address)
        closed = AsyncClient(client.address)
        async with aclosing(closed.generate(PROMPT, **fields(500)).events()) as events:
            await anext(events)
            await closed.close()
