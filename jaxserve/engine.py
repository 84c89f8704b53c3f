"""The engine as its users see it: requests in, streams of events out.

The core (a thread or a process, see `jaxserve.core.client`) runs the step loop. Here, requests are validated and
tokenized on the caller's thread; `jaxserve.front.delivery` turns each step's tokens into the events of their streams.
"""

import atexit
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from jaxserve.checkpoints.description import as_stored, describe_model
from jaxserve.config import EngineConfig
from jaxserve.constraints.check import ConstraintChecker, ConstraintLimits
from jaxserve.core.client import end_core, start_core, stop_core
from jaxserve.core.messages import (
    Abort,
    Failed,
    Gauges,
    Profile,
    Progress,
    Ready,
    Shutdown,
    StepRecord,
    Submit,
    Vocabulary,
)
from jaxserve.core.profiling import MAX_SECONDS
from jaxserve.core.replicas import ReplicatedCore
from jaxserve.core.watchdog import Watchdog
from jaxserve.events import Completion, Delta
from jaxserve.front.active_requests import ActiveRequest, ActiveRequests
from jaxserve.front.admission import Admission
from jaxserve.front.delivery import Delivery
from jaxserve.front.event_reader import EventReader
from jaxserve.front.generating import Prompt, generate_all, generate_one, request_of
from jaxserve.front.loads import EngineLoads
from jaxserve.front.request_stream import RequestStream
from jaxserve.front.resumable_stream import ResumableStream, ResumableStreams
from jaxserve.front.statistics import Statistics
from jaxserve.models.config import ModelConfig
from jaxserve.request import Request
from jaxserve.request_errors import EngineUnavailable, InvalidRequest
from jaxserve.tokenizing.tokenizer import Tokenizer

ProgressCallback = Callable[[str, float | None], None]
"""Told what is being done and the fraction done, 0..1 or None."""

STOP_SECONDS = 10.0
"""Seconds in which a core that is told to stop must end: more than its step in flight takes."""


class EngineStartError(RuntimeError):
    """The engine could not start: the model, its files, or what the configuration asks of the device are at fault."""


@contextmanager
def _reading_files() -> Iterator[None]:
    """Raises as EngineStartError what the model's files are at fault for."""
    try:
        yield
    except (OSError, ValueError) as error:  # those of checkpoints, models and tokenizers are ValueErrors
        raise EngineStartError(str(error)) from error


class Engine:
    """Serves one model. Ready when the constructor returns. Use as a context manager, or call `shutdown`.

    Args:
        config: the configuration; None takes the defaults.
        progress: told of loading, compiling and warming up.
        fields: fields of EngineConfig that override `config`.

    Raises:
        ValueError: a field of the configuration is out of range; names it and the limit.
        EngineStartError: the model, its files, or what the configuration asks of the device are at fault; says which.
    """

    def __init__(self, config: EngineConfig | None = None, *, progress: ProgressCallback | None = None, **fields: Any):
        self.config = replace(config or EngineConfig(), **fields)
        with _reading_files():
            self.config = as_stored(self.config)
        self._process_id = os.getpid()
        self._core = start_core(self.config)
        self._profiling = threading.Lock()
        try:
            self.model_config, self.tokenizer = self._describe()
            self.model_name = self.config.served_model_name or Path(self.config.model).stem
            self.device = self._await_ready(progress or (lambda what, fraction: None))
        except Exception:
            end_core(self._core, STOP_SECONDS)
            raise
        except BaseException:  # an interrupt does not wait for the core's end, but the interpreter's end does
            atexit.register(stop_core(self._core).join, STOP_SECONDS)
            raise
        self.max_context = self.device.max_context
        self.max_n = min(self.config.max_n, self.capacity)
        self._admission = Admission(
            self.model_name,
            self.model_config,
            self.tokenizer,
            self.max_context,
            self.max_n,
            self._constraint_checker(),
        )
        self._next_handle = 0
        self._handle_lock = threading.Lock()
        self._sending = threading.Lock()
        """Held from a request's being active to its being sent: an abort that overtook it would have no effect."""
        self._requests = ActiveRequests(self.capacity, self.config.max_tenant_requests)
        config, gauges = self.config, Gauges(available_pages=self.device.num_pages)
        self._kept = ResumableStreams(config.resumable_streams, config.resumable_bytes, config.resumable_seconds)
        self._delivery = Delivery(self._core, self._requests, config.stream_buffer_tokens, gauges, self._kept)
        self._watchdog: Watchdog | None = None
        if config.watchdog_seconds is not None:
            self._watchdog = Watchdog(config.watchdog_seconds, self._steps_at_work)
        atexit.register(self.shutdown)

    def _describe(self) -> tuple[ModelConfig, Tokenizer]:
        with _reading_files():
            model_config, tokenizer_source = describe_model(self.config.model)
            return model_config, Tokenizer.from_source(tokenizer_source)

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

    def _constraint_checker(self) -> ConstraintChecker | None:
        """Tells the core what its tokens are, and makes what checks constraints; None where outputs cannot be held to
        any."""
        config, eos_ids = self.config, list(self.model_config.eos_ids)
        if config.simulated_step_ms is not None or not eos_ids:
            return None
        tokens = [self.tokenizer.token_bytes(id) for id in range(self.model_config.vocab_size)]
        special_ids = sorted({*self.tokenizer.special_ids, *eos_ids} & set(range(len(tokens))))
        vocabulary = Vocabulary(tokens, special_ids, eos_ids)
        self._core.send(vocabulary)
        return ConstraintChecker(
            vocabulary, ConstraintLimits(config.max_constraint_bytes, config.constraint_cpu_seconds)
        )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    # Requests

    @property
    def capacity(self) -> int:
        """Sequences that may be in flight: those in slots and those waiting. A request has `n` of them."""
        return self.config.total_slots + self.config.max_waiting

    def submit(self, request: Request) -> EventReader:
        """Accepts a request; exactly one Finished will end its stream. Thread-safe.

        Raises:
            RequestError: one of its subclasses says why the request was not accepted; nothing is then allocated.
        """
        return self.submit_all((request,))[0]

    def submit_all(self, requests: Sequence[Request]) -> list[EventReader]:
        """Accepts all of the requests or none of them, as `submit` does one."""
        self._refuse_in_fork()
        for request in requests:
            self._admission.check(request)
        needed = sum(request.sampling.n for request in requests)
        if len(requests) > 1 and needed > self.capacity:
            raise InvalidRequest("prompt", f"{needed} sequences are asked for at once (limit {self.capacity})")
        self._requests.check_room(requests)
        submits = [
            self._admission.prepare(request, self._take_handles(request.sampling.n), time.monotonic())
            for request in requests
        ]
        streams: list[tuple[RequestStream | ResumableStream, EventReader]] = []
        try:
            for request, submit in zip(requests, submits, strict=True):
                streams.append(self._new_stream(request, submit))
            added = [
                (ActiveRequest(request, submit, stream, request.sampling.n), self._admission.texts(request))
                for request, submit, (stream, _) in zip(requests, submits, streams, strict=True)
            ]
            with self._sending:
                self._requests.add(added)
                try:
                    for submit in submits:
                        self._core.send(submit)
                except Exception:
                    for active, _ in added:
                        self._abort(active.submit.handle, active.request.sampling.n)
                    self._requests.take_back([active for active, _ in added])
                    raise
            for stream, _ in streams:
                if isinstance(stream, ResumableStream):
                    stream.is_accepted = True
        except Exception:
            for stream, _ in streams:
                if isinstance(stream, ResumableStream):
                    self._kept.discard(stream)
            raise
        return [reader for _, reader in streams]

    def _new_stream(self, request: Request, submit: Submit) -> tuple[RequestStream | ResumableStream, EventReader]:
        """What takes a request's events, and what reads them first."""
        n = request.sampling.n

        def cancel() -> None:
            self._abort(submit.handle, n)

        if not request.output.resumable:
            stream = RequestStream(request.request_id, cancel, n)
            return stream, stream
        kept = ResumableStream(request.request_id, request.tenant, cancel, n)
        self._kept.add(kept)
        return kept, kept.attach(0)

    def attach(self, request_id: str, from_token: int, tenant: str = "") -> EventReader:
        """Takes up the stream of a resumable request after its first `from_token` tokens, over all of its sequences in
        the order in which they came. Its reader before, if any, ends with StreamTaken. Thread-safe.

        Gives `Started`, then each Delta that begins there or later, then every `Finished`. Text without a token, which
        was held back to a sequence's end, comes again if its place is the very beginning.

        Raises:
            StreamNotFound: none is kept for the tenant.
            InvalidRequest: it has not come to `from_token` yet.
        """
        self._refuse_in_fork()
        return self._kept.attach(request_id, tenant, from_token)

    def _take_handles(self, count: int) -> int:
        """The first of as many consecutive handles."""
        with self._handle_lock:
            first, self._next_handle = self._next_handle, self._next_handle + count
            return first

    def abort(self, request_id: str, tenant: str | None = None) -> bool:
        """Ends a request with FinishReason.ABORT; False, and no effect, for one that is not active. Thread-safe.

        Args:
            request_id: of the request.
            tenant: whose it must be; None ends those of every tenant with this id.
        """
        found = self._requests.find(request_id, tenant)
        with self._sending:
            for active in found:
                self._abort(active.submit.handle, active.request.sampling.n)
        return bool(found)

    @property
    def _is_in_fork(self) -> bool:
        """Whether this process was forked from the engine's own: no thread of the engine is here, and what is sent to
        the core is taken for that process's word."""
        return os.getpid() != self._process_id

    def _refuse_in_fork(self) -> None:
        if self._is_in_fork:
            raise EngineUnavailable("the engine is of the process that this one was forked from")

    def _abort(self, handle: int, count: int) -> None:
        if not self._is_in_fork and any(self._requests.get(each) is not None for each in range(handle, handle + count)):
            self._core.send(Abort(handle, count))

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
            return generate_all(self.submit, self.capacity, [request_of(one, fields) for one in prompt])
        return generate_one(self.submit, request_of(prompt, fields))

    # State

    def loads(self) -> EngineLoads:
        """What the engine is doing now."""
        return EngineLoads.of(
            self._delivery.gauges,
            active=len(self._requests),
            slots=self.config.total_slots,
            total_pages=self.device.num_pages,
            resumable_streams=len(self._kept),
        )

    @property
    def statistics(self) -> Statistics:
        """What has been done since the engine started."""
        return self._delivery.statistics

    @property
    def step_records(self) -> Sequence[StepRecord]:
        """The latest steps, oldest first."""
        return self._delivery.step_records

    @property
    def is_healthy(self) -> bool:
        """Whether requests are accepted and the step loop moves: not while a failed step's device state is rebuilt."""
        return self._requests.is_open and not self._delivery.gauges.restarting and not self._is_hung

    def _steps_at_work(self) -> Mapping[int, object]:
        if isinstance(self._core, ReplicatedCore):
            return self._core.steps_at_work()
        return {0: self._delivery.gauges} if len(self._requests) else {}

    @property
    def _is_hung(self) -> bool:
        return self._watchdog is not None and self._watchdog.is_hung

    def profile(self, seconds: float) -> str:
        """Takes a trace of the device by jax.profiler while requests go on. Blocks until it is written. Thread-safe.

        Returns:
            The folder of the trace, for TensorBoard or Perfetto; one of its own in the system's folder for such.

        Raises:
            InvalidRequest: `seconds` is out of range.
            EngineUnavailable: a trace is being taken already, or the engine ended or could not take one.
        """
        if not 0 < seconds <= MAX_SECONDS:
            raise InvalidRequest("seconds", f"must be in (0, {MAX_SECONDS:g}], got {seconds!r}")
        if not self._profiling.acquire(blocking=False):
            raise EngineUnavailable("a trace is being taken already")
        try:
            if not self._delivery.is_running:
                raise EngineUnavailable("no trace is taken: the engine has stopped")
            try:
                folder = tempfile.mkdtemp(prefix="jaxserve-profile-")
            except OSError as error:
                raise EngineUnavailable(f"no trace is taken: {error}") from error
            self._core.send(Profile(folder, seconds))
            error = self._delivery.profiled.get().error
        finally:
            self._profiling.release()
        if error is not None:
            raise EngineUnavailable(f"no trace was taken: {error}")
        return folder

    def drain(self) -> None:
        """Accepts no more requests; those in flight go on."""
        self._requests.close()

    def shutdown(self, grace: float = 0.0) -> bool:
        """Drains for up to `grace` seconds, aborts what is left, and stops. Idempotent.

        A core that does not end within STOP_SECONDS, or hangs already, is given up; what is in flight ends with an
        error.

        Returns:
            Whether every request in flight finished by itself.
        """
        self.drain()
        finished = self._requests.wait_until_none(grace)
        if self._delivery.is_running:
            self._core.send(Shutdown())
            if self._is_hung or not self._delivery.join(STOP_SECONDS):
                self._core.kill()
                self._delivery.join()
        self._core.join()
        # Not only with this object, which is part of cycles: who makes engines again and again would have all of them.
        self.tokenizer.stop()
        if self._admission.constraints is not None:
            self._admission.constraints.stop()
        if self._watchdog is not None:
            self._watchdog.stop()
        atexit.unregister(self.shutdown)
        return finished
