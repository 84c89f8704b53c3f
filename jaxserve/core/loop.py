"""The core of an engine: the pipelined step loop on a thread of its own.

    receive commands -> plan step N+1 -> dispatch it -> publish step N-1 -> read step N -> retire it

The device works on step N+1 while the host reads step N. Where a row of step N+1 has a constraint, the second half of
that step is dispatched only when step N has been read, while the device works on the first half. The loop neither
detokenizes nor speaks to clients: it takes messages in and gives one message out a step.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from jaxserve.config import EngineConfig
from jaxserve.constraints.compiler import Compiled, GrammarCompiler
from jaxserve.constraints.token_masks import Ending, TokenMasks
from jaxserve.core.messages import (
    Abort,
    Failed,
    Message,
    Profile,
    Profiled,
    Progress,
    Ready,
    SequenceOutput,
    Shutdown,
    StepOutput,
    StepRecord,
    Submit,
    Vocabulary,
)
from jaxserve.core.profiling import start_trace
from jaxserve.events import FinishReason
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.scheduling.sequence import Retired, StepPlan, StepResults

log = logging.getLogger(__name__)

Publish = Callable[[Message], float]
"""Gives a message out; returns the seconds that it waited until the front had room for it."""

MAX_RESTARTS = 3
"""Failed steps after which the engine fails, unless RESTART_WINDOW steps lie between them."""
RESTART_WINDOW = 1000


NOTHING: tuple[Retired, partial[StepRecord] | None] = (Retired([], [], []), None)
"""What a step gave, and its record but for what is known when it is published."""


class StepFailure(RuntimeError):
    """The device failed a step."""


class Runner(Protocol):
    """What the loop needs of a device: `ModelRunner`, or a simulated one."""

    @property
    def compiles_after_warmup(self) -> int:
        """Programs compiled since it was ready."""
        ...

    def reset(self) -> None:
        """Rebuilds the device's state, empty, after a step failed."""
        ...

    def forward(self, plan: StepPlan) -> object:
        """Starts a step's first half; does not wait, but for copies of many pages."""
        ...

    def choose(self, forward: Any, masks: Any) -> object:
        """Starts its second half; does not wait. `masks`: what constraints allow, as `TokenMasks.fill` gives it; None
        where no row has one."""
        ...

    def read(self, pending: Any) -> StepResults:
        """Waits for a step."""
        ...


@dataclass(slots=True)
class _Dispatched:
    """A step that is on its way."""

    plan: StepPlan
    pending: object
    """The runner's own."""
    constrained: int
    mask_seconds: float
    at: float
    """Monotonic seconds."""


class StepLoop:
    """Runs scheduler and runner until told to shut down."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        masks: TokenMasks,
        pipeline_depth: int,
        publish: Publish,
        ready: Ready,
    ):
        self.commands: SimpleQueue[Message | Compiled] = SimpleQueue()
        """From any thread."""
        self.ready = ready
        self._scheduler = scheduler
        self._runner = runner
        self._masks = masks
        self._grammars = GrammarCompiler(self.commands.put)
        self._depth = pipeline_depth
        self._publish = publish
        self._pending: deque[_Dispatched] = deque()
        self._host_since = 0.0
        self._steps_retired = 0
        self._unpublished = NOTHING
        self._failed_at = 0
        self._failures = 0

    def run(self) -> None:
        """The loop. What it cannot recover from is published as Failed, and ends it."""
        try:
            self._host_since = time.monotonic()
            while self._receive():
                try:
                    self._turn()
                except StepFailure as failure:
                    self._restart(failure)
            while self._pending:
                self._retire()
                self._publish_retired()
            self._publish_retired()
        except Exception as error:
            log.exception("the step loop failed")
            self._publish(Failed(f"{type(error).__name__}: {error}"))
        finally:
            self._grammars.close()

    def _turn(self) -> None:
        plan = self._scheduler.plan(time.monotonic())
        if plan is not None:
            self._dispatch(plan)
        # Only now that the device has its next step: those who take the message work while this thread waits for it.
        self._publish_retired()
        if self._pending and (plan is None or len(self._pending) > self._depth):
            self._retire()

    def _dispatch(self, plan: StepPlan) -> None:
        """Starts a step. What a constraint allows in it follows from the tokens of all steps before: they are read, and
        the masks computed, while the device works on the first half."""
        forward = self._on_device(self._runner.forward, plan)
        rows = self._masks.rows(plan)
        masks, seconds = None, 0.0
        if rows:
            while self._pending:
                self._publish_retired()
                self._retire()
            began = time.monotonic()
            masks, endings = self._masks.fill(plan, rows)
            self._end(endings)
            seconds = time.monotonic() - began
        pending = self._on_device(self._runner.choose, forward, masks)
        self._pending.append(_Dispatched(plan, pending, len(rows), seconds, time.monotonic()))

    def _end(self, endings: list[Ending]) -> None:
        for handle, reason, error in endings:
            self._scheduler.abort(handle, time.monotonic(), reason, error)

    def _on_device(self, call: Callable[..., Any], *arguments: object) -> Any:
        """Calls the runner; any error in it is the step's."""
        try:
            return call(*arguments)
        except Exception as error:
            raise StepFailure(f"{type(error).__name__}: {error}") from error

    def _restart(self, failure: "StepFailure") -> None:
        """Rebuilds the device's state and sends the requests in flight back to the queue: they go on from the tokens
        that were read, so that none is lost or repeated. Past the bound the failure is the loop's."""
        if self._steps_retired - self._failed_at >= RESTART_WINDOW:
            self._failures = 0
        self._failures += 1
        self._failed_at = self._steps_retired
        if self._failures > MAX_RESTARTS:
            raise failure
        log.error("a step failed (%d of at most %d): %s", self._failures, MAX_RESTARTS, failure, exc_info=failure)
        self._pending.clear()
        self._publish_restarting(1)
        self._runner.reset()
        self._scheduler.restart()
        self._publish_restarting(0)

    def _publish_restarting(self, restarting: int) -> None:
        """Publishes what is there to publish, and that the device's state is being rebuilt, or has been."""
        self._publish_retired()
        gauges = self._scheduler.gauges(self._runner.compiles_after_warmup)
        self._publish(StepOutput([], [], [], replace(gauges, restarting=restarting), None))

    def _receive(self) -> bool:
        """Handles the commands that have arrived; waits for one when there is nothing to do. False at Shutdown."""
        scheduler = self._scheduler
        idle = scheduler.is_idle and not self._pending
        timeout = None
        if idle:
            self._publish_retired()
            deadline = scheduler.next_deadline()
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        go_on = True
        commands = self._take_commands(idle, timeout)
        if idle:
            self._host_since = time.monotonic()
        for command in commands:
            match command:
                case Submit(grammar=None):
                    scheduler.submit(command)
                case Submit(handle=handle, grammar=str(grammar)):
                    scheduler.submit(command, held=True)
                    self._grammars.compile(handle, grammar)
                case Compiled():
                    self._take_grammar(command)
                case Vocabulary():
                    self._grammars.learn(command)
                case Abort(handle, count):
                    for each in range(handle, handle + count):
                        scheduler.abort(each, time.monotonic())
                case Shutdown():
                    scheduler.abort_all(time.monotonic())
                    go_on = False
                case Profile():
                    start_trace(command, self.commands.put)
                case Profiled():
                    self._publish(command)
                case _:
                    raise TypeError(f"not a command: {command!r}")
        scheduler.expire(time.monotonic())
        return go_on

    def _take_commands(self, wait: bool, timeout: float | None) -> list[Message | Compiled]:
        """All commands so far; waits for one first if `wait`, up to `timeout` seconds."""
        commands = []
        if wait:
            with suppress(Empty):
                commands.append(self.commands.get(timeout=timeout))
        while not self.commands.empty():
            commands.append(self.commands.get_nowait())
        return commands

    def _take_grammar(self, compiled: Compiled) -> None:
        matcher = compiled.matcher
        for submit in self._scheduler.release(compiled.handle):
            if isinstance(matcher, Exception):
                reason = f"the constraint cannot be compiled: {matcher}"
                self._scheduler.abort(submit.handle, time.monotonic(), FinishReason.ERROR, reason)
            else:
                self._masks.start(submit, matcher.deep_copy())

    def _retire(self) -> None:
        step = self._pending.popleft()
        plan = step.plan
        waited = time.monotonic()
        results = self._on_device(self._runner.read, step.pending)
        now = time.monotonic()
        self._steps_retired += 1
        host_seconds, self._host_since = waited - self._host_since, now
        self._end(self._masks.advance(plan, results))
        retired = self._scheduler.retire(plan, results, now)
        record = partial(
            StepRecord,
            step=plan.step,
            sequences=len(plan.sequences),
            chunk_tokens=plan.chunk_tokens,
            dispatched=step.at,
            retired=now,
            host_seconds=host_seconds,
            wait_seconds=now - waited,
            given_slots=[slot for slot, _ in plan.new_owners],
            taken_slots=plan.taken_slots,
            freed_slots=_freed_slots(plan, retired.outputs),
            slots=plan.slots,
            prompt_slots=[plan.slots[piece.row] for piece in plan.pieces],
            constrained=step.constrained,
            mask_seconds=step.mask_seconds,
        )
        self._unpublished = (retired, record)

    def _publish_retired(self) -> None:
        """Publishes what the latest step gave, and then the requests that ended outside a step."""
        retired, rest = self._unpublished
        ended = self._scheduler.take_ended()
        if rest is None and not ended:
            return
        self._unpublished = NOTHING
        gauges = self._scheduler.gauges(self._runner.compiles_after_warmup)
        record = None if rest is None else rest(waiting=gauges.waiting)
        outputs = retired.outputs + ended
        for output in outputs:
            if output.finish_reason is not None:
                self._masks.forget(output.handle)
        self._host_since += self._publish(StepOutput(retired.handles, retired.tokens, outputs, gauges, record))


def _freed_slots(plan: StepPlan, outputs: list[SequenceOutput]) -> list[int]:
    """Slots of the sequences that the step's outputs end."""
    ended = {output.handle for output in outputs if output.finish_reason is not None}
    if not ended:
        return []
    return [slot for slot, owner in zip(plan.slots, plan.sequences, strict=True) if owner.submit.handle in ended]


def build_step_loop(config: EngineConfig, publish: Publish, replica: int = 0) -> StepLoop:
    """Loads the model, compiles and warms up, on the devices of one of the replicas, telling of progress.

    Imports JAX only here, in the thread or process that runs the core. Raises what loading raises.
    """
    from jaxserve.checkpoints.description import describe_model
    from jaxserve.checkpoints.loading import load_model
    from jaxserve.device.model_runner import ModelRunner, enable_compilation_cache
    from jaxserve.device.sharding import Placement
    from jaxserve.device.simulated_runner import SimulatedRunner

    def progress(what: str, fraction: float | None) -> None:
        publish(Progress(what, fraction))

    if config.simulated_step_ms is not None:
        model_config = describe_model(config.model)[0]
        runner = SimulatedRunner(config, model_config)
    else:
        enable_compilation_cache(config.compilation_cache)
        placement = Placement.of_replica(replica, config.replicas, config.tensor_parallel)
        model = load_model(config.model, config.dtype, config.quantization, progress, placement)
        model_config = model.config
        runner = ModelRunner(model, config, progress)
    scheduler = Scheduler(
        slots=config.slots,
        num_pages=runner.num_pages,
        page_size=config.page_size,
        prefill_chunks=config.prefill_chunks,
        prefix_cache=config.prefix_cache,
        host_pages=runner.host_pages,
    )
    ready = Ready(
        platform=runner.platform,
        device_kind=runner.device_kind,
        max_context=runner.max_context,
        num_pages=runner.num_pages - 1,
        attention=runner.attention_name,
        matmul=runner.matmul,
    )
    masks = TokenMasks(model_config.vocab_size, model_config.eos_ids)
    return StepLoop(scheduler, runner, masks, config.pipeline_depth, publish, ready)
