"""More than there is room for, and what nobody would send on purpose."""

import asyncio
import itertools
import random
import sys
from collections.abc import Awaitable, Callable

import aiohttp
import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from protocols import Ask, Front, fronting
from running_time import RunningTime, resident_bytes
from scripted_engine import ScriptedEngine, expected_ids
from serving import ROOT, back_to_the_start, eventually, lent, serving
from smg_grpc_proto.generated import vllm_engine_pb2
from test_refusals import detail

from jaxserve.engine import Engine
from jaxserve.events import FinishReason
from jaxserve.request import Request, StoppingParams
from rpc.client import AsyncClient
from rpc.jetstream import orchestrator_pb2
from rpc.v1 import jaxserve_pb2

sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks.gateway import Gateway

pytestmark = pytest.mark.asyncio

NATIVE = "/jaxserve.v1.Inference/Generate"
VLLM = "/vllm.grpc.engine.VllmEngine/Generate"
JETSTREAM = "/jetstream_proto.Orchestrator/Decode"


def asking(method: str, count: int) -> Message:
    """A request for so many tokens."""
    if method == NATIVE:
        return jaxserve_pb2.GenerateRequest(text="hi", stopping=jaxserve_pb2.Stopping(max_tokens=count))
    if method == VLLM:
        return vllm_engine_pb2.GenerateRequest(
            text="hi", stream=True, sampling_params=vllm_engine_pb2.SamplingParams(max_tokens=count)
        )
    return orchestrator_pb2.DecodeRequest(
        text_content=orchestrator_pb2.DecodeRequest.TextContent(text="hi"), max_tokens=count
    )


@pytest.mark.parametrize("method", [NATIVE, VLLM, JETSTREAM])
async def test_100_requests_past_the_queues_limit_are_refused_at_once_and_health_answers_all_the_while(
    method: str,
) -> None:
    engine = ScriptedEngine(slots=8, max_waiting=16)
    engine.paused.set()
    async with (
        serving(engine) as (server, client),
        grpc.aio.insecure_channel(client.address) as channel,
        grpc.aio.insecure_channel(client.address) as probing,
    ):
        call = channel.unary_stream(method)
        check = health_pb2_grpc.HealthStub(probing).Check  # pyright: ignore[reportAttributeAccessIssue]
        message = asking(method, 3).SerializeToString()
        probes: list[float] = []
        await probing.channel_ready()

        with RunningTime() as clock:

            async def probe() -> None:
                while True:
                    began = clock.seconds
                    answer = await check(health_pb2.HealthCheckRequest())
                    assert answer.status == health_pb2.HealthCheckResponse.SERVING
                    probes.append(clock.seconds - began)
                    await asyncio.sleep(0.01)

            async def run() -> tuple[grpc.StatusCode, float]:
                began = clock.seconds
                try:
                    async for _ in call(message):
                        pass
                except grpc.aio.AioRpcError as error:
                    assert detail(error, error_details_pb2.RetryInfo).retry_delay.ToNanoseconds() > 0
                    return error.code(), clock.seconds - began
                return grpc.StatusCode.OK, 0.0

            probing_task = asyncio.create_task(probe())
            accepted = [asyncio.create_task(run()) for _ in range(8 + 16)]
            await eventually(lambda: engine.submitted == 24)
            refused: list[tuple[grpc.StatusCode, float]] = []
            for _ in range(10):
                refused += await asyncio.gather(*(run() for _ in range(10)))
            await eventually(lambda: len(probes) >= 3 or probing_task.done())
            engine.paused.clear()
            results = await asyncio.gather(*accepted)
            probing_task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await probing_task
        assert {code for code, _ in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert max(seconds for _, seconds in refused) <= 0.1
        assert {code for code, _ in results} == {grpc.StatusCode.OK}
        assert engine.submitted == 24
        assert max(probes) <= 0.1
        await back_to_the_start(engine, server)


def seeds() -> dict[str, list[bytes]]:
    """Messages to mutate, by method: every field set in some of them."""
    native = jaxserve_pb2.GenerateRequest(
        request_id="r",
        text="hello",
        sampling=jaxserve_pb2.Sampling(temperature=0.5, top_k=3, logit_bias={3: 1.0}),
        stopping=jaxserve_pb2.Stopping(max_tokens=1, stop=["x"], stop_token_ids=[4]),
        output=jaxserve_pb2.Output(logprobs=1),
    )
    variants = [native.SerializeToString()]
    native.messages.messages.add(role="user", content="hi")
    variants.append(native.SerializeToString())
    native.token_ids.ids.extend([1, 2])
    variants.append(native.SerializeToString())
    vllm = vllm_engine_pb2.GenerateRequest(
        request_id="r",
        tokenized=vllm_engine_pb2.TokenizedInput(original_text="hi", input_ids=[104, 105]),
        stream=True,
        sampling_params=vllm_engine_pb2.SamplingParams(
            temperature=0.5, top_p=0.5, top_k=3, max_tokens=1, stop=["x"], logit_bias={3: 1.0}, logprobs=1, seed=3, n=1
        ),
    )
    jetstream = orchestrator_pb2.DecodeRequest(
        token_content=orchestrator_pb2.DecodeRequest.TokenContent(token_ids=[104, 105]),
        max_tokens=1,
        num_samples=1,
        metadata=orchestrator_pb2.DecodeRequest.Metadata(start_time=1.5),
    )
    return {NATIVE: variants, VLLM: [vllm.SerializeToString()], JETSTREAM: [jetstream.SerializeToString()]}


def mutated(generator: random.Random, seed: bytes) -> bytes:
    """A message with a few bytes changed, left out or put in."""
    data = bytearray(seed)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(data)) if data else 0
        match generator.randrange(3):
            case 0 if data:
                data[place] = generator.randrange(256)
            case 1:
                del data[place : place + generator.randint(1, 3)]
            case _:
                data[place:place] = generator.randbytes(generator.randint(1, 4))
    return bytes(data)


async def test_mutated_messages_are_answered_soon_cost_no_memory_and_are_never_an_internal_error(
    pytestconfig: pytest.Config,
) -> None:
    generator = random.Random(3)
    waves = pytestconfig.getoption("mutations") // 20
    engine = ScriptedEngine(slots=32, max_waiting=32, step_time=0.0, max_context=64)
    async with (
        serving(engine) as (server, client),
        grpc.aio.insecure_channel(client.address) as channel,
    ):
        calls = {method: channel.unary_stream(method) for method in seeds()}
        code = grpc.StatusCode
        proper = {code.OK, code.INVALID_ARGUMENT, code.NOT_FOUND, code.ALREADY_EXISTS}
        seen: set[grpc.StatusCode] = set()
        wrong: list[tuple[str, str, grpc.aio.AioRpcError]] = []
        slowest = 0.0
        with RunningTime() as clock:

            async def run(method: str, data: bytes) -> None:
                nonlocal slowest
                began = clock.seconds
                try:
                    async for _ in calls[method](data):
                        pass
                    seen.add(grpc.StatusCode.OK)
                except grpc.aio.AioRpcError as error:
                    seen.add(error.code())
                    if error.code() not in proper:
                        wrong.append((method, data.hex(), error))
                slowest = max(slowest, clock.seconds - began)

            async def wave() -> None:
                chosen = [generator.choice(list(seeds().items())) for _ in range(20)]
                await asyncio.gather(*(run(name, mutated(generator, generator.choice(of))) for name, of in chosen))

            for _ in range(10):
                await wave()  # what is allocated once
            memory = resident_bytes()
            for _ in range(waves):
                await wave()
            grown = resident_bytes() - memory
        assert not wrong
        assert {code.OK, code.INVALID_ARGUMENT} <= seen
        assert slowest <= 1.0
        assert grown <= 64 << 20
        await back_to_the_start(engine, server)
        await canary(client)


async def canary(client: AsyncClient) -> None:
    """A request among the ruins is exact."""
    answer = await client.generate_once("hello", max_tokens=20)
    assert answer.token_ids == tuple(expected_ids(20))


async def overload(engine: Engine, front: Front, run: Callable[[], Awaitable[tuple[bool, float]]]) -> list[float]:
    """Fills slots and queue, then asks a hundred times more than there is room for, five at once, while health of every
    protocol is probed. Returns how long each of the hundred took. `run`: whether one was refused as it should be, and the
    seconds that it took.
    """
    room = engine.capacity
    stopping = StoppingParams(max_tokens=2000, ignore_eos=True)
    accepted = [engine.submit(Request(token_ids=(300, 301), stopping=stopping)) for _ in range(room)]
    probes: list[float] = []

    async def probe(clock: RunningTime) -> None:
        while True:
            for speaker in front.speakers.values():
                began = clock.seconds
                assert await speaker.is_serving()
                probes.append(clock.seconds - began)
            await asyncio.sleep(0.01)

    async def timely() -> tuple[bool, float]:
        """Of up to five times the best, as neighbours on the machine slow any one."""
        rights, took = [], 1.0
        while len(rights) < 5 and took > 0.1:
            right, seconds = await run()
            rights.append(right)
            took = min(took, seconds)
        return all(rights), took

    await run()  # connects

    with RunningTime() as clock:
        probing = asyncio.create_task(probe(clock))
        refused: list[tuple[bool, float]] = []
        for _ in range(20):
            refused += await asyncio.gather(*(timely() for _ in range(5)))
        await eventually(lambda: len(probes) >= 9 or probing.done())
        probing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probing
    assert [right for right, _ in refused] == [True] * 100
    assert max(probes) <= 0.5  # on its own a server answers within 0.1 s; a gateway wants the processors, too
    assert engine.loads().running + engine.loads().waiting == room, "none of the hundred took another's place"
    for stream in accepted:
        stream.cancel()
        assert [event async for event in stream][-1].finish_reason is FinishReason.ABORT
    await front.as_before()
    return sorted(seconds for _, seconds in refused)


@pytest.fixture
def tight():
    """Room for 24 requests, which do not end by themselves while a test lasts."""
    with Engine(simulated_step_ms=25.0, slots=8, max_waiting=16, max_context=2048) as engine:
        yield engine


@pytest.mark.parametrize("protocol", ["native", "vllm", "http"])
async def test_100_requests_past_the_real_queues_limit_are_refused_each_within_100_ms(
    tight: Engine, protocol: str
) -> None:
    async with fronting(lent(tight)) as front:
        speaker, clock = front.speakers[protocol], RunningTime()

        async def run() -> tuple[bool, float]:
            began = clock.seconds
            outcome = await speaker.run(Ask())
            right = outcome.code == "RESOURCE_EXHAUSTED" and bool(outcome.retry_after) and not outcome.started
            return right, clock.seconds - began

        with clock:
            assert (await overload(tight, front, run))[-1] <= 0.1


async def test_100_requests_past_the_limit_are_429_through_the_gateway_each_within_100_ms(tight: Engine) -> None:
    async with fronting(lent(tight)) as front:
        gateway = await asyncio.to_thread(Gateway, [f"127.0.0.1:{front.server.port}"], "--disable-retries")
        clock = RunningTime()
        try:
            async with aiohttp.ClientSession(gateway.url) as client:
                body = {"model": tight.model_name, "prompt": "hi", "max_tokens": 3}

                async def run() -> tuple[bool, float]:
                    began = clock.seconds
                    async with client.post("/v1/completions", json=body) as answer:
                        await answer.read()
                    # smg passes on the status and the words, and not when to try again.
                    return answer.status == 429 and "retry-after" not in answer.headers, clock.seconds - began

                with clock:
                    assert (await overload(tight, front, run))[-1] <= 0.1
        finally:
            await asyncio.to_thread(gateway.close)


async def test_four_times_the_pages_all_finish_exact_and_never_a_second_is_without_a_token() -> None:
    """Requests of every protocol at once; `tests/scheduling/test_starvation.py` has the same in steps."""
    generator = random.Random(9)
    with Engine(simulated_step_ms=4.0, slots=8, max_waiting=32, max_context=256, num_pages=33) as engine:
        asks: list[Ask] = []
        pages, demand, grown = engine.loads().total_pages, 0, 0
        while demand < 4 * pages:
            asks.append(Ask(generator.randint(1, 100), generator.randint(60, 150)))
            (needed, held) = (
                -(-tokens // 16) for tokens in (asks[-1].prompt_tokens + asks[-1].max_tokens, len(asks[-1].ids))
            )
            demand, grown = demand + needed, grown + needed - held
        async with fronting(lent(engine)) as front:
            with RunningTime() as clock:
                moments = [clock.seconds]
                turns = itertools.cycle(front.speakers.values())
                for ask in asks:
                    ask.on_token = lambda _: moments.append(clock.seconds)
                outcomes = await asyncio.gather(*(speaker.run(ask) for speaker, ask in zip(turns, asks, strict=False)))
            for ask, outcome in zip(asks, outcomes, strict=True):
                assert outcome.is_exact(ask), outcome
            assert max(after - before for before, after in itertools.pairwise(moments)) <= 1.0
            assert 0 < engine.loads().preemptions <= grown, "each gives at least one page to one that stays ahead of it"
            await front.as_before()
