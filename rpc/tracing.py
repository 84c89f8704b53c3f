"""OpenTelemetry: one span a request, under the span of whoever sent it, and its times in histograms, by the conventions
for generative AI.

Both are made from what the engine says when a request ends, so that nothing is done a token.
"""

import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextvars import ContextVar
from typing import cast
from weakref import WeakKeyDictionary, finalize

from jaxserve.events import Event, Finished, FinishReason
from jaxserve.request import Request
from rpc.served_engine import EventStream, ServedEngine
from rpc.telemetry import DURATION, FIRST_TOKEN, OUTPUT_TOKEN, PROVIDER, Telemetry

_parent: ContextVar[dict[str, str]] = ContextVar("jaxserve_trace_parent", default={})  # noqa: B039 - never changed


def set_trace_parent(headers: Iterable[tuple[str, str | bytes]]) -> None:
    """Says whose span the call of this context belongs to, by the headers of W3C Trace Context: several `tracestate`
    are one list."""
    values: dict[str, list[str]] = {"traceparent": [], "tracestate": []}
    for name, value in headers:
        if name in values:
            values[name].append(str(value))
    _parent.set({name: ",".join(found) for name, found in values.items() if found})


class _TracedEngine:
    """Follows each request that is accepted to its end. Everything else is the engine's own."""

    def __init__(self, engine: ServedEngine, telemetry: Telemetry):
        self._engine = engine
        self._telemetry = telemetry
        self._kept: WeakKeyDictionary[object, _Trace] = WeakKeyDictionary()
        """Of requests whose streams outlive their readers, by the stream."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def submit_all(self, requests: Sequence[Request]) -> Sequence[EventStream]:
        began = time.time_ns()
        streams, model = self._engine.submit_all(requests), self._engine.model_name
        traces = [_Trace(self._telemetry, request, model, began) for request in requests]
        for stream, trace in zip(streams, traces, strict=True):
            if trace.request.output.resumable:
                self._kept[stream.origin] = trace
                finalize(stream.origin, trace.end).atexit = False  # nobody has read its end
        return [_TracedStream(stream, trace) for stream, trace in zip(streams, traces, strict=True)]

    def attach(self, request_id: str, from_token: int) -> EventStream:
        stream = self._engine.attach(request_id, from_token)
        trace = self._kept.get(stream.origin)
        if trace is None:  # of a request that was not submitted here
            return stream
        trace.left = None
        return _TracedStream(stream, trace)

    def shutdown(self, grace: float = 0.0) -> bool:
        finished = self._engine.shutdown(grace)
        for trace in list(self._kept.values()):
            trace.end()
        return finished


class _TracedStream:
    """The events of a request; its last one ends the span."""

    def __init__(self, stream: EventStream, trace: "_Trace"):
        self.request_id = stream.request_id
        self.origin = stream.origin
        self._stream = stream
        self._trace = trace

    def leave(self) -> None:
        self._trace.left = time.time_ns()
        if not self._trace.request.output.resumable:
            self._trace.end()  # nobody may read on
        self._stream.leave()

    def cancel(self) -> None:
        self._trace.end()  # nobody may read on
        self._stream.cancel()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await self._stream.__anext__()  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(event, Finished):
            self._trace.add(event)
        return event


class _Trace:
    """What becomes a request's span and its values of the histograms."""

    def __init__(self, telemetry: Telemetry, request: Request, model: str, began: int):
        self.request = request
        self.left: int | None = None
        """Nanoseconds of the epoch since when nobody reads."""
        self._telemetry = telemetry
        self._model = model
        self._began = began
        self._parent = _parent.get()
        self._finished: dict[int, Finished] = {}
        """By index: each reader of a stream is told of every sequence's end."""
        self._ended = False

    def add(self, finished: Finished) -> None:
        """A sequence has ended."""
        self._finished.setdefault(finished.index, finished)
        self.left = None  # who left was not the last to read
        if len(self._finished) == self.request.sampling.n:
            self.end()

    def end(self) -> None:
        """The request has ended, or nobody will know when. Idempotent."""
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if self._ended:
            return
        self._ended = True
        request, finished = self.request, list(self._finished.values())
        operation = "text_completion" if request.messages is None else "chat"
        common = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": request.model or self._model,
            "gen_ai.response.model": self._model,
        }
        times = _times(finished)
        failure = _failure(request, finished)
        if failure is not None:
            common["error.type"] = failure
        span = self._telemetry.tracer.start_span(
            f"{operation} {self._model}",
            context=TraceContextTextMapPropagator().extract(self._parent),
            kind=SpanKind.SERVER,
            start_time=self._began,
            attributes={**common, **_asked(request), **_had(finished), **times},
        )
        errors = [one.error for one in finished if one.finish_reason is FinishReason.ERROR]
        if errors:
            span.set_status(StatusCode.ERROR, errors[0])
        ended = self.left or time.time_ns()
        span.end(ended)
        times.setdefault(DURATION, (ended - self._began) / 1e9)  # its reader left before its end
        for name, seconds in times.items():
            self._telemetry.histograms[name].record(seconds, common)


def _failure(request: Request, ended: list[Finished]) -> str | None:
    """`error.type`: the ending of a sequence that is no success; None where all are."""
    if len(ended) < request.sampling.n:
        return FinishReason.ABORT.value
    reasons = {one.finish_reason for one in ended}
    failures = (FinishReason.ERROR, FinishReason.DEADLINE, FinishReason.ABORT)
    return next((failure.value for failure in failures if failure in reasons), None)


def _times(ended: list[Finished]) -> dict[str, float]:
    """Seconds by the names of the histograms; of the first sequence where they differ."""
    if not ended:
        return {}
    tokens, timings = ended[0].usage.completion_tokens, ended[0].timings
    times = {DURATION: max(one.timings.total for one in ended)}
    if tokens:
        times[FIRST_TOKEN] = timings.queue + timings.prefill
    if tokens > 1:
        times[OUTPUT_TOKEN] = timings.decode / (tokens - 1)
    return times


def _asked(request: Request) -> dict[str, str | int | float]:
    """What the request asked for, where it said so."""
    sampling = request.sampling
    asked: dict[str, str | int | float | None] = {
        "gen_ai.response.id": request.request_id,
        "gen_ai.request.temperature": float(sampling.temperature),
        "gen_ai.request.top_p": float(sampling.top_p),
        "gen_ai.request.top_k": sampling.top_k or None,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.max_tokens": request.stopping.max_tokens,
        "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _had(ended: list[Finished]) -> dict[str, list[str] | int | float]:
    """What became of it."""
    if not ended:
        return {"gen_ai.response.finish_reasons": [FinishReason.ABORT.value]}
    first = ended[0]
    return {
        "gen_ai.usage.input_tokens": first.usage.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": first.usage.cached_tokens,
        "gen_ai.usage.output_tokens": sum(one.usage.completion_tokens for one in ended),
        "gen_ai.response.finish_reasons": [one.finish_reason.value for one in ended],
        "jaxserve.queue_time": first.timings.queue,
    }


def traced(engine: ServedEngine, telemetry: Telemetry) -> ServedEngine:
    """The engine, each request of which becomes a span and values of the histograms."""
    return cast(ServedEngine, _TracedEngine(engine, telemetry))
