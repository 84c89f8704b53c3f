"""The engine as its users see it: requests in, streams of events out.

The core (a thread or a process, see `core_client`) runs the step loop. Here, requests are validated and tokenized on
the caller's thread, and one delivery thread turns each step's tokens into text for the requests' own streams.
"""

import asyncio
import atexit
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from jaxserve.admission import Admission
from jaxserve.checkpoints import describe_model
from jaxserve.config import EngineConfig
from jaxserve.core_client import start_core
from jaxserve.core_messages import (
    Abort,
    Failed,
    Gauges,
    Progress,
    Ready,
    SequenceOutput,
    Shutdown,
    StepOutput,
    StepRecord,
    Submit,
)
from jaxserve.request import (
    Completion,
    Delta,
    DuplicateRequestId,
    EngineUnavailable,
    Finished,
    FinishReason,
    InvalidRequest,
    QueueFull,
    Request,
    Started,
    Timings,
    TokenLogprob,
    Usage,
)
from jaxserve.request_stream import RequestStream, wake
from jaxserve.text_stream import TextStream
from jaxserve.tokenizer import Tokenizer

log = logging.getLogger(__name__)

ProgressCallback = Callable[[str, float | None], None]
"""Told what is being done and the fraction done, 0..1 or None."""

Prompt = str | Request | Mapping[str, Any]
"""Text, a request, or a mapping of a request's API names."""

STEP_RECORDS = 4096
"""Steps whose records are kept."""

RETRY_AFTER = 1.0
"""Seconds after which a refused client is told to try again."""


class EngineStartError(RuntimeError):
    """The engine could not start: the model, its files or the configuration are at fault."""


@dataclass(frozen=True)
class EngineLoads:
    """What an engine is doing."""

    running: int
    """Requests that hold a slot."""
    waiting: int
    """Requests accepted and not yet running."""
    slots: int
    available_pages: int
    """Pages free or evictable: all of them when nothing runs."""
    cached_pages: int
    """Pages held by no request whose content may be hit."""
    total_pages: int
    steps: int
    preemptions: int
    prefix_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int
    """Prompt tokens found there."""
    overrun_tokens: int
    """Row-steps spent on sequences that had already ended."""
    compiles_after_warmup: int
    """More than 0 is a defect."""


@dataclass
class _Entry:
    """An accepted request that has not ended."""

    request: Request
    submit: Submit
    stream: RequestStream
    text: TextStream | None
    tokens: int = 0
    """Tokens delivered."""
    cached_tokens: int = 0
    times: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0))


class Engine:
    """Serves one model. Ready when the constructor returns. Use as a context manager, or call `shutdown`.

    Args:
        config: the configuration; None takes the defaults.
        progress: told of loading, compiling and warming up.
        fields: fields of EngineConfig that override `config`.

    Raises:
        EngineStartError: the model, its files or the configuration are at fault; says which.
    """

    def __init__(self, config: EngineConfig | None = None, *, progress: ProgressCallback | None = None, **fields: Any):
        self.config = replace(config or EngineConfig(), **fields)
        self._core = start_core(self.config)
        self.model_config, tokenizer_source = describe_model(self.config.model)
        self.model_name = self.config.served_model_name or Path(self.config.model).stem
        self.tokenizer = Tokenizer.from_source(tokenizer_source)
        self.device = self._await_ready(progress or (lambda what, fraction: None))
        self.max_context = self.device.max_context
        self._admission = Admission(self.model_name, self.model_config, self.tokenizer, self.max_context)
        self._lock = threading.Lock()
        self._entries: dict[int, _Entry] = {}
        self._handles: dict[str, int] = {}
        self._numbers = itertools.count()
        self._changed = threading.Condition(self._lock)
        self._accepting = True
        self._failure: str | None = None
        pages = self.device.num_pages
        self._gauges = Gauges(0, 0, 0, pages, 0, 0, 0, 0, 0, 0, 0)
        self.step_records: deque[StepRecord] = deque(maxlen=STEP_RECORDS)
        """The latest steps, oldest first."""
        self._delivery = threading.Thread(target=self._deliver, name="jaxserve-delivery", daemon=True)
        self._delivery.start()
        atexit.register(self.shutdown)

    def _await_ready(self, progress: ProgressCallback) -> Ready:
        while True:
            match self._core.receive():
                case Progress(what, fraction):
                    progress(what, fraction)
                case Ready() as ready:
                    return ready
                case Failed(error):
                    raise EngineStartError(error)
                case message:
                    raise EngineStartError(f"the engine ended while starting: {message!r}")

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # Requests

    @property
    def capacity(self) -> int:
        """Requests that may be in flight: those in slots and those waiting."""
        return self.config.slots + self.config.max_waiting

    def submit(self, request: Request) -> RequestStream:
        """Accepts a request; exactly one Finished will end its stream. Thread-safe.

        Raises:
            RequestError: one of its subclasses says why the request was not accepted; nothing is then allocated.
        """
        request.validate()
        self._check_room(request)
        handle = next(self._numbers)
        submit = self._admission.prepare(request, handle, time.monotonic())
        text = None
        if request.output.return_text or request.stopping.stop:
            stopping = request.stopping
            text = TextStream(
                self.tokenizer, stop=stopping.stop, include_stop=stopping.include_stop, min_tokens=stopping.min_tokens
            )
        stream = RequestStream(request.request_id, lambda: self._abort(handle))
        with self._lock:
            self._check_room(request)
            self._entries[handle] = _Entry(request, submit, stream, text)
            self._handles[request.request_id] = handle
        self._core.send(submit)
        return stream

    def _check_room(self, request: Request) -> None:
        if self._failure is not None:
            raise EngineUnavailable(f"the engine has failed: {self._failure}")
        if not self._accepting:
            raise EngineUnavailable("the engine is draining and takes no requests")
        if request.request_id in self._handles:
            raise DuplicateRequestId(f"request_id: {request.request_id!r} is active")
        if len(self._entries) >= self.capacity:
            raise QueueFull(self.capacity, RETRY_AFTER)

    def abort(self, request_id: str) -> bool:
        """Ends a request with FinishReason.ABORT; False, and no effect, for one that is not active. Thread-safe."""
        handle = self._handles.get(request_id)
        if handle is not None:
            self._abort(handle)
        return handle is not None

    def _abort(self, handle: int) -> None:
        if handle in self._entries:
            self._core.send(Abort(handle))

    @overload
    def generate(self, prompt: Prompt, **fields: Any) -> AsyncIterator[Delta]: ...
    @overload
    def generate(self, prompt: Sequence[Prompt], **fields: Any) -> list[Completion]: ...
    def generate(self, prompt: Prompt | Sequence[Prompt], **fields: Any) -> AsyncIterator[Delta] | list[Completion]:
        """Generates for one prompt, as an async iterator of deltas, or for a list of them, waiting for all.

        Args:
            prompt: text, a Request, or a mapping of API names; or a list of these.
            fields: sampling, stopping and output fields by their API names, for prompts given as text or mapping.

        Raises:
            RequestError: a request was not accepted.
        """
        if not isinstance(prompt, str | Request | Mapping):
            return self._generate_all([_request(one, fields) for one in prompt])
        return self._generate_one(_request(prompt, fields))

    async def _generate_one(self, request: Request) -> AsyncIterator[Delta]:
        stream = self.submit(request)
        try:
            async for event in stream:
                if isinstance(event, Delta):
                    yield event
                elif isinstance(event, Finished) and event.error is not None:
                    raise RuntimeError(event.error)
        finally:
            stream.cancel()

    def _generate_all(self, requests: list[Request]) -> list[Completion]:
        streams: list[RequestStream] = []
        completions: list[Completion] = []
        try:
            for request in requests:
                while len(streams) - len(completions) >= self.capacity:
                    completions.append(collect(streams[len(completions)]))
                streams.append(self.submit(request))
            completions += [collect(stream) for stream in streams[len(completions) :]]
        finally:
            for stream in streams[len(completions) :]:
                stream.cancel()
        return completions

    # State

    def loads(self) -> EngineLoads:
        """What the engine is doing now."""
        gauges = self._gauges
        active = len(self._entries)
        return EngineLoads(
            running=min(gauges.running, active),
            waiting=max(active - gauges.running, 0),
            slots=self.config.slots,
            available_pages=gauges.available_pages,
            cached_pages=gauges.cached_pages,
            total_pages=self.device.num_pages,
            steps=gauges.step,
            preemptions=gauges.preemptions,
            prefix_queries=gauges.prefix_queries,
            prefix_hits=gauges.prefix_hits,
            overrun_tokens=gauges.overrun_tokens,
            compiles_after_warmup=gauges.compiles_after_warmup,
        )

    @property
    def is_healthy(self) -> bool:
        """Whether requests are accepted."""
        return self._accepting and self._failure is None

    def drain(self) -> None:
        """Accepts no more requests; those in flight go on."""
        self._accepting = False

    def shutdown(self, grace: float = 0.0) -> bool:
        """Drains for up to `grace` seconds, aborts what is left, and stops. Idempotent.

        Returns:
            Whether every request in flight finished by itself.
        """
        self.drain()
        with self._changed:
            finished = self._changed.wait_for(lambda: not self._entries, timeout=grace)
        if self._delivery.is_alive():
            self._core.send(Shutdown())
            self._delivery.join()
        self._core.join()
        atexit.unregister(self.shutdown)
        return finished

    # Delivery

    def _deliver(self) -> None:
        """Runs on the delivery thread until the core ends."""
        while (message := self._core.receive()) is not None:
            match message:
                case StepOutput(outputs, gauges, record):
                    self._gauges = gauges
                    if record is not None:
                        self.step_records.append(record)
                    touched = [entry.stream for output in outputs if (entry := self._deliver_output(output))]
                    _wake(touched)
                case Failed(error):
                    self._fail(error)
                case _:
                    raise TypeError(f"unexpected message {message!r}")
        self._fail("the engine has stopped")

    def _deliver_output(self, output: SequenceOutput) -> _Entry | None:
        entry = self._entries.get(output.handle)
        if entry is None:
            return None  # a stop string ended it; the core had not heard of that yet
        if output.times is not None:
            entry.times = output.times
        if output.started is not None:
            entry.cached_tokens = output.started
            submit = entry.submit
            entry.stream.start(Started(entry.request.request_id, len(submit.token_ids), output.started, submit.seed))
        matched = self._push(entry, output) if output.token_ids else None
        if matched is not None:
            self._core.send(Abort(output.handle))
            self._finish(output.handle, entry, FinishReason.STOP, entry.tokens, matched)
        elif output.finish_reason is not None:
            self._flush(entry)
            reason = FinishReason(output.finish_reason)
            ended = entry.times[2]
            self._finish(
                output.handle, entry, reason, output.completion_tokens, output.matched_stop, output.error, ended
            )
        return entry

    def _push(self, entry: _Entry, output: SequenceOutput) -> str | None:
        """Delivers tokens; returns the stop string that they complete, if any."""
        token_ids, text, matched = output.token_ids, "", None
        if entry.text is not None:
            delta = entry.text.push(token_ids)
            text, matched = delta.text, delta.matched_stop
            token_ids = token_ids[: delta.tokens_used]
        entry.tokens += len(token_ids)
        logprobs = None
        if output.logprobs is not None:
            logprobs = [
                TokenLogprob(t, p, tuple((i, v) for i, v in top)) for t, p, top in output.logprobs[: len(token_ids)]
            ]
        wanted = entry.request.output
        unread = entry.stream.push(
            token_ids if wanted.return_token_ids else [], text if wanted.return_text else "", logprobs
        )
        if unread > self.config.stream_buffer_tokens and matched is None:
            log.warning("request %s: the client left %d tokens unread; aborting", entry.request.request_id, unread)
            self._core.send(Abort(output.handle))
        return matched

    def _flush(self, entry: _Entry) -> None:
        if entry.text is not None and entry.request.output.return_text:
            text = entry.text.flush()
            if text:
                entry.stream.push([], text, None)

    def _finish(
        self,
        handle: int,
        entry: _Entry,
        reason: FinishReason,
        tokens: int,
        matched_stop: str | int | None = None,
        error: str | None = None,
        ended: float | None = None,
    ) -> None:
        """Gives the terminal event. `ended`: when the core had the last token; None for now."""
        with self._changed:
            del self._entries[handle]
            del self._handles[entry.request.request_id]
            self._changed.notify_all()
        usage = Usage(len(entry.submit.token_ids), entry.cached_tokens, tokens)
        timings = _timings(entry.submit.arrival, entry.times, time.monotonic() if ended is None else ended)
        entry.stream.finish(Finished(entry.request.request_id, 0, reason, usage, timings, matched_stop, error))

    def _fail(self, error: str) -> None:
        """Ends every request in flight: the core is gone."""
        self._failure = self._failure or error
        entries = list(self._entries.items())
        for handle, entry in entries:
            self._flush(entry)
            self._finish(handle, entry, FinishReason.ERROR, entry.tokens, error=error)
        _wake([entry.stream for _, entry in entries])


def collect(stream: RequestStream) -> Completion:
    """Reads a stream to its end."""
    token_ids: list[int] = []
    text: list[str] = []
    logprobs: list[TokenLogprob] | None = None
    for event in stream:
        if isinstance(event, Delta):
            token_ids += event.token_ids
            text.append(event.text)
            if event.logprobs is not None:
                logprobs = (logprobs or []) + list(event.logprobs)
        elif isinstance(event, Finished):
            return Completion(
                request_id=stream.request_id,
                index=event.index,
                token_ids=tuple(token_ids),
                text="".join(text),
                logprobs=None if logprobs is None else tuple(logprobs),
                finish_reason=event.finish_reason,
                usage=event.usage,
                timings=event.timings,
                matched_stop=event.matched_stop,
                error=event.error,
            )
    raise AssertionError("a stream ended without Finished")


def _request(prompt: Prompt, fields: Mapping[str, Any]) -> Request:
    if isinstance(prompt, Request):
        if fields:
            raise InvalidRequest(next(iter(fields)), "a Request carries its own fields")
        return prompt
    return Request.from_json({"prompt": prompt, **fields} if isinstance(prompt, str) else {**fields, **prompt})


def _timings(arrival: float, times: Sequence[float], ended: float) -> Timings:
    """Phases of a request's life; those it never reached are 0."""
    scheduled, first_token, _ = times
    return Timings(
        queue=(scheduled or ended) - arrival,
        prefill=(first_token or ended) - scheduled if scheduled else 0.0,
        decode=ended - first_token if first_token else 0.0,
        total=ended - arrival,
    )


def _wake(streams: Iterable[RequestStream]) -> None:
    """Wakes the readers of streams, with one call for each event loop."""
    waiters: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = {}
    for stream in streams:
        waiter = stream.take_waiter()
        if waiter is not None:
            waiters.setdefault(waiter[0], []).append(waiter[1])
    for loop, futures in waiters.items():
        try:
            loop.call_soon_threadsafe(wake, futures)
        except RuntimeError:
            log.debug("an event loop closed while its streams were open")
