"""What a generate call does in every protocol: admit the request, follow its stream, end with the right status."""

import asyncio
import contextvars
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from functools import partial

import grpc.aio

from jaxserve.events import Event, Finished, FinishReason
from jaxserve.log import set_request_id
from jaxserve.request import Request
from jaxserve.request_errors import EngineUnavailable, QueueFull
from rpc import errors
from rpc.lifecycle import Lifecycle, State
from rpc.open_calls import OpenCall, OpenCalls
from rpc.security.principal import Principal, current_principal
from rpc.served_engine import EventStream, ServedEngine
from rpc.tracing import set_trace_parent

logger = logging.getLogger(__name__)

INLINE_CHARACTERS = 2048
"""Longest text, in characters, that is tokenized on the event loop: about a millisecond. Longer goes to a thread."""
INLINE_TOKENS = 8192
"""Longest prompt of token ids that is checked on the event loop: likewise."""

BuildRequest = Callable[[float | None], Request]
"""Makes the engine's request of a message. Given the call's deadline, `time.monotonic()` seconds; None where it has
none. Raises InvalidRequest."""

TakeEvent = Callable[[Event], Awaitable[object] | None]
"""Gives an event to the protocol; returns the write to wait for, or None where nothing is written."""


_FAILURES = (FinishReason.DEADLINE, FinishReason.ERROR)
"""Endings of one sequence that are the call's."""


class CallRunner:
    """Runs generate calls. An error of one call ends that call alone. Servicers have what they share from here."""

    def __init__(self, lifecycle: Lifecycle, calls: OpenCalls, tokenizing: Executor, compiling: Executor):
        """Threads on which requests are submitted, so that the event loop never waits.

        Args:
            tokenizing: for those with long prompts.
            compiling: for those with constraints, which take turns at being compiled: nobody else waits for them.
        """
        self.lifecycle = lifecycle
        self.calls = calls
        self._tokenizing = tokenizing
        self._compiling = compiling
        self._submitting: Counter[Executor] = Counter()
        """Submissions that wait for a thread or run in one; the engine does not count them yet."""
        self._early: dict[OpenCall, Principal] = {}
        """The calls of those submissions, left or not, and who made them: the engine cannot abort them yet."""

    async def run(
        self, request_id: str, build: BuildRequest, context: grpc.aio.ServicerContext, take: TakeEvent
    ) -> None:
        """Runs a request until its stream has ended. Raises what `errors.failure_of` knows.

        Whatever ends the call early (the client leaves, its deadline passes, a write fails) ends the request as well.
        """
        set_trace_parent(context.invocation_metadata() or ())
        call = self._open(request_id)
        self.lifecycle.ready_engine()
        (stream,) = await self.admit([build(_deadline(context))], [call])
        await self._follow(stream, call, take)

    async def attach(self, request_id: str, from_token: int, take: TakeEvent) -> None:
        """Takes up the stream of a request and runs it to its end, as `run` does; also while draining."""
        call = self._open(request_id)
        stream = self.lifecycle.loaded_engine().attach(request_id, from_token)
        call.take(stream)
        await self._follow(stream, call, take)

    def abort(self, request_id: str) -> bool:
        """Ends a request of the caller, also one that the engine does not have yet; False where there is none."""
        caller, engine = current_principal(), self.lifecycle.engine
        early = [call for call, owner in self._early.items() if call.request_id == request_id and caller.reaches(owner)]
        for call in early:
            call.aborted = True
        # The engine may have it for a moment before its call knows: to end it twice is to end it once.
        return (engine is not None and engine.abort(request_id)) or bool(early)

    def _open(self, request_id: str) -> OpenCall:
        """Takes up the call that this task runs, until the task ends: the status is sent later than its handler ends.

        The context's own `add_done_callback` would tell of the same, but ties what it is given, the context and the
        call's state into a cycle, which then lies about until the garbage is collected.
        """
        set_request_id(request_id)
        call = self.calls.open(request_id)
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(lambda _: self.calls.close(call))
        return call

    async def _follow(self, stream: EventStream, call: OpenCall, take: TakeEvent) -> None:
        ending: Finished | None = None
        try:
            async for event in stream:
                if isinstance(event, Finished):
                    ending = worse(ending, event)
                written = take(event)
                if written is not None:
                    call.write_began = time.monotonic()
                    await written
                    call.write_began = None
        except grpc.aio.InternalError as error:
            # A write to a client that has gone, seen before its cancellation is: the same thing, said the same way.
            raise asyncio.CancelledError from error
        finally:
            stream.leave()  # ends what still runs, unless its stream is to be taken up again
        call.write_began = time.monotonic()  # of what follows: an answer that is one message, or the status
        self.raise_for(ending, call)

    def in_thread[Result](self, work: Callable[[], Result]) -> asyncio.Future[Result]:
        """Has one of the threads for long prompts do something else with the tokenizer."""
        return asyncio.get_running_loop().run_in_executor(self._tokenizing, work)

    async def admit(self, requests: Sequence[Request], calls: Sequence[OpenCall]) -> Sequence[EventStream]:
        """Validates and queues all of the requests or none, before anything is written; each is a call's.

        Raises what `errors.failure_of` knows.
        """
        engine = self.lifecycle.ready_engine()
        submit = partial(engine.submit_all, requests)
        if _are_quick(requests):
            streams = submit()
        else:
            compiles = any(request.constraint is not None for request in requests)
            threads = self._compiling if compiles else self._tokenizing
            streams = await self._submit_from_thread(engine, submit, threads, calls)
        for call, stream in zip(calls, streams, strict=True):
            call.take(stream)
        return streams

    async def _submit_from_thread(
        self,
        engine: ServedEngine,
        submit: Callable[[], Sequence[EventStream]],
        threads: Executor,
        calls: Sequence[OpenCall],
    ) -> Sequence[EventStream]:
        limit = engine.config.total_slots + engine.config.max_waiting
        if self._submitting[threads] >= limit:
            raise QueueFull(limit)
        self._submitting[threads] += 1
        submitted = asyncio.get_running_loop().run_in_executor(threads, contextvars.copy_context().run, submit)
        self._early |= dict.fromkeys(calls, current_principal())

        def settle(_: object) -> None:
            self._submitting[threads] -= 1
            for call in calls:
                del self._early[call]

        submitted.add_done_callback(settle)
        try:
            return await asyncio.shield(submitted)
        except asyncio.CancelledError:
            # The client left meanwhile. A thread cannot be stopped: leave what it comes back with.
            submitted.add_done_callback(partial(_leave, calls))
            raise

    def raise_for(self, last: Finished | None, call: OpenCall) -> None:
        """Turns an ending that is not the client's or the model's doing into the status after the last message."""
        if last is None:
            raise errors.RequestFailed("the engine ended the stream without a terminal event")
        if last.finish_reason is FinishReason.DEADLINE:
            raise errors.DeadlineExceeded("the deadline passed; the work was stopped")
        ended_early = last.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
        if ended_early and self.lifecycle.state is State.STOPPED:
            raise EngineUnavailable("the server stopped before the request had finished")
        if last.finish_reason is FinishReason.ERROR:
            logger.error("request %s: %s", call.request_id, last.error, extra={"request_id": call.request_id})
            raise errors.RequestFailed(last.error or "the engine failed this request")


def worse(ending: Finished | None, event: Finished) -> Finished:
    """Of the endings of a call's sequences the one that is the call's: a failure, if there is one."""
    return event if ending is None or ending.finish_reason not in _FAILURES else ending


def _deadline(context: grpc.aio.ServicerContext) -> float | None:
    """When a call must end, in `time.monotonic()` seconds; None where it has no deadline."""
    remaining = context.time_remaining()
    if remaining is not None and remaining <= 0:
        raise errors.DeadlineExceeded("the deadline had passed when the request arrived")
    return None if remaining is None else time.monotonic() + remaining


def _are_quick(requests: Sequence[Request]) -> bool:
    """Whether submitting them takes no longer than an event loop may be held."""
    characters = tokens = 0
    for request in requests:
        # A chat template is rendered, and a constraint compiled, in a process of its own, which may take its time.
        if request.messages is not None or request.constraint is not None:
            return False
        characters += len(request.prompt or "")
        tokens += len(request.token_ids or ())
    return characters <= INLINE_CHARACTERS and tokens <= INLINE_TOKENS


def _leave(calls: Sequence[OpenCall], submitted: asyncio.Future[Sequence[EventStream]]) -> None:
    if not submitted.cancelled() and submitted.exception() is None:
        for call, stream in zip(calls, submitted.result(), strict=True):
            call.take(stream)
            stream.leave()
