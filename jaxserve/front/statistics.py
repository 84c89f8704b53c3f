"""What an engine has done since it started, counted where tokens are delivered: nothing of it is on the step loop.

Plain numbers without a format; `rpc.metrics` gives them to Prometheus. One thread writes, any may read.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Sequence

from jaxserve.core.messages import StepRecord
from jaxserve.events import Finished, FinishReason

IDLE_WINDOW = 60.0
"""Seconds over which the idle part of the device is reported."""

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_HOST_STEP = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_LAGS = (1, 2, 3, 4, 6, 8, 16)

_PLANNED_AHEAD = 2
"""Steps that are planned when one is told of: they may have given slots, not free yet, to the last who waited."""


class Distribution:
    """How often values fell between bounds. `counts` has one more entry than `bounds`: what is above the last."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts a value at the first bound that is not below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def quantile(self, share: float) -> float | None:
        """About the value that this share of the values does not exceed, within its bounds; None without values."""
        rank = share * sum(self.counts)
        if not rank:
            return None
        low = 0.0
        for high, count in zip(self.bounds, self.counts, strict=False):
            if rank <= count:
                return low + (high - low) * rank / count
            rank -= count
            low = high
        return low


class _SlotReuse:
    """The slots of one replica, from a sequence's last token to the slot's next owner."""

    def __init__(self) -> None:
        self._freed: dict[int, int] = {}
        """By slot: the step that freed it."""
        self._waiting: deque[int] = deque(maxlen=_PLANNED_AHEAD)
        """After the latest steps."""

    def lags(self, record: StepRecord) -> list[int]:
        """Of the slots that a step found with new owners, where requests waited for them: how many steps after their
        last token."""
        freed = [self._freed.pop(slot, None) for slot in record.given_slots]
        if not record.waiting:
            self._freed.clear()  # nobody waits: a slot that stays free is no lag
        if record.waiting or any(self._waiting):
            self._freed.update(dict.fromkeys(record.freed_slots, record.step))
        self._waiting.append(record.waiting)
        return [record.step - step for step in freed if step is not None]


class Statistics:
    """Counters and distributions. Times are in seconds."""

    def __init__(self) -> None:
        self.time_to_first_token = Distribution(_LATENCY)
        """From acceptance to the delivery of the first token."""
        self.inter_token_latency = Distribution(_BETWEEN_TOKENS)
        """Between deliveries of tokens of one sequence."""
        self.e2e_latency = Distribution(_LATENCY)
        self.queue_time = Distribution(_LATENCY)
        self.prefill_time = Distribution(_LATENCY)
        self.decode_time = Distribution(_LATENCY)
        self.iteration_tokens = Distribution(_TOKENS)
        """Tokens that a step computed: one a decoding sequence, and those of prompts."""
        self.host_step = Distribution(_HOST_STEP)
        """The step loop's own work in a step."""
        self.slot_reuse_lag = Distribution(_LAGS)
        """Steps from a sequence's last token to its slot's next owner, where requests waited for slots."""
        self.prompt_tokens = 0
        """Of sequences that began, those from the prefix cache included."""
        self.generation_tokens = 0
        """As `Usage.completion_tokens` counts them."""
        self.finished = {reason.value: 0 for reason in FinishReason}
        """Sequences that ended, by reason."""
        self._reuse: defaultdict[int, _SlotReuse] = defaultdict(_SlotReuse)
        """By replica."""

    # Called by the one thread that delivers

    def on_step(self, record: StepRecord) -> None:
        """A step is done."""
        self.iteration_tokens.observe(record.sequences + record.chunk_tokens)
        self.host_step.observe(record.host_seconds)
        for lag in self._reuse[record.replica].lags(record):
            self.slot_reuse_lag.observe(lag)

    def on_start(self, prompt_tokens: int) -> None:
        """A request holds a slot."""
        self.prompt_tokens += prompt_tokens

    def on_first_tokens(self, count: int, seconds: float) -> None:
        """The first tokens of a sequence are delivered, so long after its acceptance."""
        self.time_to_first_token.observe(seconds)
        self.generation_tokens += count

    def on_more_tokens(self, count: int, seconds: float) -> None:
        """Further tokens of a sequence are delivered, so long after those before."""
        self.inter_token_latency.observe(seconds)
        self.generation_tokens += count

    def on_finish(self, finished: Finished, delivered: int) -> None:
        """A sequence has ended, of which so many tokens were delivered."""
        self.generation_tokens += finished.usage.completion_tokens - delivered  # the end-of-sequence token
        self.finished[finished.finish_reason] += 1
        timings = finished.timings
        self.e2e_latency.observe(timings.total)
        self.queue_time.observe(timings.queue)
        if delivered:
            self.prefill_time.observe(timings.prefill)
            self.decode_time.observe(timings.decode)


def device_idle_ratio(records: Sequence[StepRecord], now: float, window: float = IDLE_WINDOW) -> float:
    """The part of the latest `window` seconds of work that the device waited for the host, by the host's clock.

    A gap between two steps of a replica counts as far as the step loop worked in it: where nothing was to be done it is
    no idleness.
    """
    idle = busy = 0.0
    latest: dict[int, StepRecord] = {}
    for record in records:
        if record.retired < now - window:
            continue
        before = latest.get(record.replica)
        if before is not None:
            gap = max(0.0, record.dispatched - before.retired)
            idle += min(gap, record.host_seconds)
            busy += record.retired - max(record.dispatched, before.retired)
        latest[record.replica] = record
    return idle / (idle + busy) if idle + busy else 0.0
