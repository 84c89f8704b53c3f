"""From the core's messages to the events of each request's own stream, on one thread of the front.

Text, stop strings, the terminal event and the bound of what a reader may leave unread are decided here.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from queue import SimpleQueue

from jaxserve.core.client import Core
from jaxserve.core.messages import (
    Abort,
    Failed,
    Gauges,
    Profiled,
    SequenceOutput,
    Shutdown,
    StepOutput,
    StepRecord,
    TokenLogprobs,
)
from jaxserve.events import Finished, FinishReason, Started, Timings, TokenLogprob, Usage
from jaxserve.front.active_requests import ActiveRequests, ActiveSequence
from jaxserve.front.event_reader import wake_readers
from jaxserve.front.request_stream import RequestStream
from jaxserve.front.resumable_stream import ResumableStream, ResumableStreams
from jaxserve.front.statistics import Statistics

log = logging.getLogger(__name__)

SWEEP_INTERVAL = 0.25
"""Seconds between looks at the streams that are kept."""
STEP_RECORDS = 4096
"""Steps whose records are kept."""


class Delivery:
    """Delivers until the core ends; then ends what is left.

    Args:
        core: whose messages are delivered.
        requests: those in flight; what ends is removed.
        stream_buffer_tokens: tokens that a reader may leave unread.
        gauges: the core's state before its first step.
        kept: streams that outlive their readers.
    """

    def __init__(
        self,
        core: Core,
        requests: ActiveRequests,
        stream_buffer_tokens: int,
        gauges: Gauges,
        kept: ResumableStreams,
    ):
        self.gauges = gauges
        """The core's state after the latest step."""
        self.step_records: deque[StepRecord] = deque(maxlen=STEP_RECORDS)
        """The latest steps, oldest first."""
        self.statistics = Statistics()
        self.profiled: SimpleQueue[Profiled] = SimpleQueue()
        """Traces that are done, for whoever asked."""
        self._core = core
        self._kept = kept
        self._requests = requests
        self._stream_buffer_tokens = stream_buffer_tokens
        self._thread = threading.Thread(target=self._run, name="jaxserve-delivery", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the core has not ended."""
        return self._thread.is_alive()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the core to end, up to `timeout` seconds; whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._deliver_all()
        except Exception as error:
            log.exception("delivery failed")
            self._core.send(Shutdown())
            self._fail(f"delivery failed: {error!r}")
            while self._core.receive() is not None:
                pass  # it may wait for room to say that it has ended
        finally:
            self.profiled.put(Profiled("the engine has stopped"))

    def _deliver_all(self) -> None:
        while (message := self._core.receive()) is not None:
            touched: list[RequestStream | ResumableStream] = []
            match message:
                case StepOutput(handles, tokens, outputs, gauges, record):
                    self.gauges = gauges
                    if record is not None:
                        self.step_records.append(record)
                        self.statistics.on_step(record)
                    # A sequence may be gone: a stop string ended it, and the core had not heard of that yet.
                    for handle, token in zip(handles, tokens, strict=True):
                        if (sequence := self._requests.get(handle)) is not None:
                            touched.append(sequence.of.stream)
                            try:
                                self._push(sequence, [token], None)
                            except Exception as error:
                                self._fail_alone(sequence, error)
                    for output in outputs:
                        if (sequence := self._requests.get(output.handle)) is not None:
                            touched.append(sequence.of.stream)
                            try:
                                self._deliver(sequence, output)
                            except Exception as error:
                                self._fail_alone(sequence, error)
                    wake_readers(stream.take_waiter() for stream in touched)
                    self._kept.sweep(SWEEP_INTERVAL)
                case Profiled():
                    self.profiled.put(message)
                case Failed(error):
                    self._fail(error)
                case _:
                    raise TypeError(f"unexpected message {message!r}")
        self._fail("the engine has stopped")

    def _deliver(self, sequence: ActiveSequence, output: SequenceOutput) -> None:
        active = sequence.of
        if output.times is not None:
            sequence.times = output.times
        if output.prompt_logprobs is not None:
            active.prompt_logprobs += _token_logprobs(output.prompt_logprobs)
        if output.started is not None and active.cached_tokens is None:
            active.cached_tokens = output.started
            submit = active.submit
            self.statistics.on_start(len(submit.token_ids))
            active.stream.start(
                Started(
                    active.request.request_id,
                    len(submit.token_ids),
                    output.started,
                    submit.seed,
                    tuple(active.prompt_logprobs) if submit.prompt_logprobs >= 0 else None,
                )
            )
        stopped = self._push(sequence, output.token_ids, output.logprobs) if output.token_ids else False
        if output.finish_reason is not None and not stopped:
            _flush(sequence)
            reason = FinishReason(output.finish_reason)
            ended = sequence.times[2]
            self._finish(sequence, reason, output.completion_tokens, output.matched_stop, output.error, ended)

    def _push(self, sequence: ActiveSequence, token_ids: list[int], reported: list[TokenLogprobs] | None) -> bool:
        """Delivers tokens. Whether they complete a stop string, which ends the sequence."""
        active = sequence.of
        text, matched = "", None
        if sequence.text is not None:
            delta = sequence.text.push(token_ids)
            text, matched = delta.text, delta.matched_stop
            token_ids = token_ids[: delta.tokens_used]
        self._count(sequence, len(token_ids))
        logprobs = None if reported is None else _token_logprobs(reported[: len(token_ids)])
        wanted = active.request.output
        shown_ids, shown_text = token_ids if wanted.return_token_ids else [], text if wanted.return_text else ""
        unread = active.stream.push(sequence.index, shown_ids, shown_text, logprobs)
        if matched is not None:
            self._core.send(Abort(sequence.handle))
            self._finish(sequence, FinishReason.STOP, sequence.tokens, matched)
        elif unread > self._stream_buffer_tokens and not active.has_slow_reader:
            active.has_slow_reader = True
            name = active.request.request_id
            log.warning("the client left %d tokens unread; aborting", unread, extra={"request_id": name})
            active.stream.cancel()
        return matched is not None

    def _count(self, sequence: ActiveSequence, tokens: int) -> None:
        now = time.monotonic()
        if sequence.delivered:
            self.statistics.on_more_tokens(tokens, now - sequence.delivered)
        else:
            self.statistics.on_first_tokens(tokens, now - sequence.of.submit.arrival)
        sequence.delivered = now
        sequence.tokens += tokens

    def _finish(
        self,
        sequence: ActiveSequence,
        reason: FinishReason,
        tokens: int,
        matched_stop: str | int | None = None,
        error: str | None = None,
        ended: float | None = None,
    ) -> None:
        """Gives the terminal event. `ended`: when the core had the last token; None for now."""
        self._requests.remove(sequence)
        active = sequence.of
        request_id, submit = active.request.request_id, active.submit
        usage = Usage(len(submit.token_ids), active.cached_tokens or 0, tokens)
        timings = _timings(submit.arrival, sequence.times, time.monotonic() if ended is None else ended)
        finished = Finished(request_id, sequence.index, reason, usage, timings, matched_stop, error)
        self.statistics.on_finish(finished, sequence.tokens)
        active.stream.finish(finished)

    def _fail_alone(self, sequence: ActiveSequence, error: Exception) -> None:
        """Ends a sequence that cannot be delivered, for want of memory say; the others know nothing of it."""
        log.error("delivery failed", exc_info=error, extra={"request_id": sequence.of.request.request_id})
        self._core.send(Abort(sequence.handle))
        if self._requests.get(sequence.handle) is not None:
            self._finish(sequence, FinishReason.ERROR, sequence.tokens, error=f"delivery failed: {error!r}")

    def _fail(self, error: str) -> None:
        """Ends every request in flight: the core is gone."""
        self._requests.fail(error)
        left = self._requests.all()
        for sequence in left:
            _flush(sequence)
            self._finish(sequence, FinishReason.ERROR, sequence.tokens, error=error)
        wake_readers(sequence.of.stream.take_waiter() for sequence in left)


def _token_logprobs(reported: list[TokenLogprobs]) -> list[TokenLogprob]:
    return [TokenLogprob(token, logprob, tuple((i, v) for i, v in top)) for token, logprob, top in reported]


def _flush(sequence: ActiveSequence) -> None:
    """Shows what text was held back, now that no more tokens come."""
    if sequence.text is not None and sequence.of.request.output.return_text:
        text = sequence.text.flush()
        if text:
            sequence.of.stream.push(sequence.index, [], text, None)


def _timings(arrival: float, times: Sequence[float], ended: float) -> Timings:
    """Phases of a sequence's life, from monotonic seconds."""
    scheduled, first_token, _ = times
    return Timings(
        queue=(scheduled or ended) - arrival,
        prefill=(first_token or ended) - scheduled if scheduled else 0.0,
        decode=ended - first_token if first_token else 0.0,
        first_token=first_token - arrival if first_token else 0.0,
        total=ended - arrival,
    )
