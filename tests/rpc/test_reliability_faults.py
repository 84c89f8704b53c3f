"""Reliability 19, 21, 22, 23 and 30 as clients of every protocol see them: a device that fails, hangs or gives nonsense."""

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from protocols import Ask, Front, Outcome, Speaker, fronting
from running_time import RunningTime
from safetensors.numpy import load_file, save_file
from serving import ROOT, back_to_the_start, eventually, lent

from jaxserve.core.loop import MAX_RESTARTS
from jaxserve.engine import Engine
from jaxserve.front.request_stream import RequestStream
from jaxserve.tokenizing.chat_template import ChatTemplate

pytestmark = pytest.mark.asyncio

NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def front() -> AsyncIterator[Front]:
    """An engine of its own: what is done to it may not come right."""
    with Engine(simulated_step_ms=5.0, slots=16, max_context=512, watchdog_seconds=1.0) as engine:
        async with fronting(lent(engine)) as front:
            yield front


class Streams:
    """Streams of every protocol, all of which have begun."""

    def __init__(self, front: Front, max_tokens: int = 60):
        self.asks: list[Ask] = []
        self.seen: list[int] = []
        self.tasks: list[asyncio.Task[Outcome]] = []
        for number, speaker in enumerate([*front.speakers.values()] * 2):
            self.seen.append(0)
            ask = Ask(3 + number, max_tokens, on_token=self._note(number))
            self.asks.append(ask)
            self.tasks.append(asyncio.create_task(speaker.run(ask)))

    def _note(self, number: int):
        def note(count: int) -> None:
            self.seen[number] = count

        return note

    async def begun(self) -> None:
        await eventually(lambda: all(self.seen))

    async def exact(self) -> None:
        """No token is lost or repeated."""
        for ask, outcome in zip(self.asks, await asyncio.gather(*self.tasks), strict=True):
            assert outcome.is_exact(ask), outcome

    async def failed(self, code: str) -> None:
        """Each is told so once, having got the beginning of what it should."""
        for ask, outcome in zip(self.asks, await asyncio.gather(*self.tasks), strict=True):
            whole = Outcome(token_ids=outcome.token_ids, reasons=["length"])
            ask.max_tokens = len(outcome.token_ids)
            assert outcome.code == code and whole.is_exact(ask), outcome
            assert outcome.reasons in ([], ["error"], ["abort"]), outcome


async def refused_everywhere(front: Front) -> None:
    """New requests and all health checks say that nothing is taken."""
    for speaker in front.speakers.values():
        assert not await speaker.is_serving()
        outcome = await speaker.run(Ask())
        assert (outcome.code, outcome.started) == ("UNAVAILABLE", False), outcome


async def flips_within(front: Front, seconds: float, clock: RunningTime, since: float) -> None:
    """Health of every protocol says so in time."""
    for speaker in front.speakers.values():
        while await speaker.is_serving():
            assert clock.seconds - since <= seconds
            await asyncio.sleep(0.01)
    assert clock.seconds - since <= seconds


async def serving_again(front: Front) -> None:
    for speaker in front.speakers.values():
        while not await speaker.is_serving():
            await asyncio.sleep(0.01)


def runner_of(front: Front):
    return front.engine._core._loop._runner  # pyright: ignore[reportAttributeAccessIssue]


async def test_while_a_failed_steps_state_is_rebuilt_health_says_so_and_every_stream_goes_on_exactly(
    front: Front,
) -> None:
    runner, rebuilding, may_go_on = runner_of(front), threading.Event(), threading.Event()
    read, reset = runner.read, runner.reset

    def fail(pending: object) -> object:
        runner.read = read
        raise RuntimeError("injected")

    def slow_reset() -> None:
        rebuilding.set()
        may_go_on.wait()
        reset()

    with RunningTime() as clock:
        streams = Streams(front)
        await streams.begun()
        runner.reset, runner.read = slow_reset, fail
        await asyncio.to_thread(rebuilding.wait)
        await flips_within(front, 1.0, clock, clock.seconds)
        await refused_everywhere(front)
        may_go_on.set()
        await streams.exact()
        await serving_again(front)
    await front.as_before()


async def test_past_the_bound_of_restarts_every_stream_fails_internal_and_health_says_so_within_1_s(
    front: Front,
) -> None:
    runner, failures = runner_of(front), 0
    watch = front.native.health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING

    def fail(plan: object) -> object:
        nonlocal failures
        failures += 1
        raise RuntimeError("injected")

    with RunningTime() as clock:
        streams = Streams(front)
        await streams.begun()
        runner.forward = fail
        since = clock.seconds
        await streams.failed("INTERNAL")
        assert (await watch.read()).status == NOT_SERVING
        await flips_within(front, 1.0, clock, since)
        await refused_everywhere(front)
    watch.cancel()
    assert failures == MAX_RESTARTS + 1
    assert len(front.server.calls) == 0


async def test_a_hung_step_is_unready_in_time_everywhere_its_streams_wait_and_those_who_leave_are_let_go(
    front: Front,
) -> None:
    runner, hanging, may_go_on = runner_of(front), threading.Event(), threading.Event()
    read = runner.read

    def hang(pending: object) -> object:
        hanging.set()
        may_go_on.wait()
        return read(pending)

    with RunningTime() as clock:
        streams = Streams(front)
        await streams.begun()
        runner.read = hang
        await asyncio.to_thread(hanging.wait)
        since = clock.seconds
        leaving = [
            asyncio.create_task(speaker.run(Ask(max_tokens=300, timeout=0.5))) for speaker in front.speakers.values()
        ]
        await flips_within(front, 1.0 + 1.0, clock, since)  # the watchdog's time and a second
        # A deadline is kept though no step moves.
        assert {outcome.code for outcome in await asyncio.gather(*leaving)} == {"DEADLINE_EXCEEDED"}
        await refused_everywhere(front)
        assert not any(task.done() for task in streams.tasks)
        runner.read = read
        may_go_on.set()
        await streams.exact()
        await serving_again(front)
    await front.as_before()


async def test_a_hung_engine_is_given_up_at_the_drain_limit_and_its_streams_are_told(front: Front) -> None:
    engine = front.engine._engine  # pyright: ignore[reportAttributeAccessIssue]
    runner, hanging, may_go_on = runner_of(front), threading.Event(), threading.Event()

    def hang(pending: object) -> object:
        hanging.set()
        may_go_on.wait()
        raise RuntimeError("nobody listens any more")

    streams = Streams(front)
    await streams.begun()
    runner.read = hang
    await asyncio.to_thread(hanging.wait)
    await eventually(lambda: not engine.is_healthy)
    front.server.lifecycle.engine = engine  # its owner's, so that the server ends it
    drained = await front.server.stop(grace=0.1)
    assert not drained
    await streams.failed("UNAVAILABLE")
    may_go_on.set()


POISON = 77
"""A token whose embedding is made NaN."""


async def test_a_row_that_is_not_finite_fails_internal_alone_and_nothing_of_it_is_cached(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(ROOT / "tests/fixtures/families/llama2", folder)
    tensors = dict(load_file(folder / "model.safetensors"))
    embeddings = tensors["model.embed_tokens.weight"].copy()
    embeddings[POISON] = np.nan
    save_file({**tensors, "model.embed_tokens.weight": embeddings}, folder / "model.safetensors", {"format": "pt"})
    fields = {"temperature": 0.0}
    healthy = [Ask(token_ids=[*range(100 + 3 * row, 130 + 2 * row)], max_tokens=12, fields=fields) for row in range(6)]
    poisoned = [*range(3, 35), POISON, *range(35, 50)]
    shape = {"dtype": "float32", "slots": 16, "prefill_chunks": (32,), "num_pages": 96, "small_slots": 8}
    with Engine(model=str(folder), **shape) as engine:
        async with fronting(lent(engine)) as front:
            kinds: list[Speaker] = [*front.speakers.values()]
            alone = [await kinds[row % 3].run(ask) for row, ask in enumerate(healthy)]
            bad = [speaker.run(Ask(token_ids=poisoned, fields=fields)) for speaker in kinds]
            good = [kinds[row % 3].run(ask) for row, ask in enumerate(healthy)]
            *failed, _, _, _, _, _, last = outcomes = await asyncio.gather(*bad, *good)
            assert last.code == "OK"
            for outcome in failed[:3]:
                assert (outcome.code, outcome.token_ids) == ("INTERNAL", []), outcome
                assert "not finite" in outcome.message
            for before, after in zip(alone, outcomes[3:], strict=True):
                assert len(before.token_ids) == 12
                assert (after.code, after.token_ids, after.reasons) == ("OK", before.token_ids, ["length"])
            await back_to_the_start(engine, front.server)
            hits = engine.loads().prefix_hits
            assert (await front.native.run(Ask(token_ids=poisoned[:32], fields=fields))).code == "OK"
            assert engine.loads().prefix_hits == hits, "pages of a request that failed were found"
            await back_to_the_start(engine, front.server)


def starve_once(front: Front, where: str, patch: pytest.MonkeyPatch) -> None:
    """Makes the next allocation there fail."""
    engine, push = front.engine, RequestStream.push

    def starved(*_: object) -> object:
        patch.undo()
        raise MemoryError("injected")

    def push_or_starve(self: RequestStream, *delta: object) -> object:
        # Of the request that is to fail, told by its length.
        active = engine._requests.all()  # pyright: ignore[reportAttributeAccessIssue]
        hers = [one.of.stream for one in active if one.of.submit.max_length == VICTIM.max_tokens + 5]
        return starved() if self in hers else push(self, *delta)  # pyright: ignore[reportArgumentType]

    match where:
        case "tokenizing":
            patch.setattr(engine.tokenizer, "encode", starved)
        case "accepting":
            patch.setattr(engine._requests, "add", starved)  # pyright: ignore[reportAttributeAccessIssue]
        case "delivering":
            patch.setattr(RequestStream, "push", push_or_starve)
        case _:
            patch.setattr(runner_of(front), "forward", starved)


VICTIM = Ask(5, 101)


@pytest.mark.parametrize("where", ["tokenizing", "accepting", "delivering", "device"])
async def test_an_allocation_that_fails_costs_its_request_at_most_and_the_engine_lives(
    front: Front, where: str
) -> None:
    streams = Streams(front, 200)
    await streams.begun()
    ask = Ask(text="a b c d e", max_tokens=5) if where == "tokenizing" else VICTIM
    for speaker in front.speakers.values():
        with pytest.MonkeyPatch.context() as patch:
            starve_once(front, where, patch)
            outcome = await speaker.run(ask)
        # A step that fails costs nobody anything.
        assert outcome.is_exact(ask) if where == "device" else outcome.code == "INTERNAL", outcome
    await streams.exact()
    await front.as_before()


async def test_a_chat_template_that_never_ends_is_refused_within_1_s_and_holds_up_nobody(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = ChatTemplate("{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}", {})
    escaping = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {})
    for template, message in ((endless, "processor time"), (escaping, "forbidden")):
        monkeypatch.setattr(
            type(front.engine.tokenizer),
            "render_chat",
            lambda self, messages, tools=(), template=template: template.render(messages),
        )
        with RunningTime() as clock:
            streams = Streams(front, 40)
            await streams.begun()
            chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
            since = clock.seconds
            async with front.http.client.post("/v1/chat/completions", json=chat) as answer:
                error = (await answer.json())["error"]
            assert clock.seconds - since <= 1.0
            assert (answer.status, error["param"]) == (400, "messages")
            assert message in error["message"]
            await streams.exact()
    await front.as_before()
