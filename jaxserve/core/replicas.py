"""Several cores as one: copies of the model on devices of their own, behind one engine.

Each replica is a whole core, with its own step loop, slots, pages and prefix cache, and knows of no other: no step
waits for another replica's, and a request's tokens are those of a single engine. A data axis of the mesh would run all
of them in lockstep, at the pace of the longest step, to save nothing: replicas share no data but the weights, which
each device holds anyway. They are threads of one process, as one process owns an accelerator's runtime. A core that
fails past its restarts ends the engine.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

from jaxserve.config import EngineConfig
from jaxserve.core.channel import Core, Outbox
from jaxserve.core.messages import (
    Abort,
    Failed,
    Gauges,
    Message,
    Profile,
    Profiled,
    Progress,
    Ready,
    Shutdown,
    StepOutput,
    Submit,
)

log = logging.getLogger(__name__)


class ReplicatedCore:
    """Gives each request to the replica with the fewest sequences in flight, and merges what the replicas say.

    Args:
        config: of the engine.
        cores: its replicas, which have just been started.
    """

    def __init__(self, config: EngineConfig, cores: Sequence[Core]):
        self._cores = cores
        self._slots = config.slots
        self._outbox = Outbox(config.publish_ahead)
        self._lock = threading.Lock()
        self._replica_of: dict[int, int] = {}
        """By the handle of a sequence in flight."""
        self._in_flight = [0] * len(cores)
        self._gauges: list[Gauges | None] = [None] * len(cores)
        self._ready: list[Ready] = []
        self._running = len(cores)
        self._threads = [
            threading.Thread(target=self._forward, args=(number,), name=f"jaxserve-replica-{number}", daemon=True)
            for number in range(len(cores))
        ]
        for thread in self._threads:
            thread.start()

    def send(self, command: Message) -> None:
        """Gives a command to the replica that it concerns. Thread-safe."""
        match command:
            case Submit(handle, fork_seeds=forks):
                handles = range(handle, handle + 1 + len(forks))
                with self._lock:
                    number = min(range(len(self._cores)), key=lambda number: self._in_flight[number])
                    self._in_flight[number] += len(handles)
                    self._replica_of |= dict.fromkeys(handles, number)
                self._cores[number].send(command)
            case Abort(handle, count):
                # Sequences of one request are on one replica, but some may have ended.
                found = [self._replica_of.get(one) for one in range(handle, handle + count)]
                for number in {number for number in found if number is not None}:
                    self._cores[number].send(command)
            case Profile():
                # A process takes one trace at a time, and it is of all devices.
                self._cores[0].send(command)
            case _:
                for core in self._cores:
                    core.send(command)

    def steps_at_work(self) -> Mapping[int, object]:
        """By the number of each replica with work, an object that is another one after each of its steps."""
        with self._lock:
            return {number: self._gauges[number] for number, count in enumerate(self._in_flight) if count}

    def receive(self) -> Message | None:
        """The replicas' next message; None once all have ended."""
        return self._outbox.get()

    def join(self) -> None:
        """Waits for all replicas to end after Shutdown."""
        for core in self._cores:
            core.join()
        for thread in self._threads:
            thread.join()

    def kill(self) -> None:
        """Gives up all replicas."""
        for core in self._cores:
            core.kill()

    def _forward(self, number: int) -> None:
        """Passes on what one replica says, on a thread of its own."""
        try:
            while (message := self._cores[number].receive()) is not None:
                self._pass_on(number, message)
        except Exception as error:
            log.exception("replica %d cannot be heard", number)
            self._fail(Failed(f"replica {number} cannot be heard: {error!r}"))
            while self._cores[number].receive() is not None:
                pass  # it may wait for room to say that it has ended
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self._outbox.close()

    def _pass_on(self, number: int, message: Message) -> None:
        match message:
            case Progress():
                # All load and compile alike: the first speaks for them.
                if number == 0:
                    self._outbox.put(message)
            case Ready():
                self._add_ready(message)
            case StepOutput():
                self._outbox.put(self._merged(number, message))
            case Profiled():
                self._outbox.put(message)
            case Failed():
                self._fail(message)
            case _:
                raise TypeError(f"unexpected message {message!r}")

    def _fail(self, failed: Failed) -> None:
        self._outbox.put(failed)
        for core in self._cores:
            core.send(Shutdown())

    def _add_ready(self, ready: Ready) -> None:
        with self._lock:
            self._ready.append(ready)
            if len(self._ready) < len(self._cores):
                return
            pages = sum(ready.num_pages for ready in self._ready)
            context = min(ready.max_context for ready in self._ready)
        self._outbox.put(replace(ready, num_pages=pages, max_context=context))

    def _merged(self, number: int, output: StepOutput) -> StepOutput:
        """The output with the gauges of all replicas together, and slots numbered through all of them."""
        with self._lock:
            for ended in output.outputs:
                if ended.finish_reason is not None and self._replica_of.pop(ended.handle, None) is not None:
                    self._in_flight[number] -= 1
            self._gauges[number] = output.gauges
            known = [gauges for gauges in self._gauges if gauges is not None]
        record = output.record
        if record is not None:
            first = number * self._slots
            slots = {name: [first + slot for slot in getattr(record, name)] for name in _SLOT_LISTS}
            record = replace(record, replica=number, **slots)
        return replace(output, gauges=_sum(known), record=record)


_SLOT_LISTS = ("given_slots", "taken_slots", "freed_slots", "slots", "prompt_slots")


def _sum(gauges: Sequence[Gauges]) -> Gauges:
    return Gauges(*(sum(getattr(one, field.name) for one in gauges) for field in fields(Gauges)))
