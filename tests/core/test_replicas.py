"""Several cores as one: who gets a request, and what the front hears."""

import queue
from dataclasses import replace

import pytest

from jaxserve.config import EngineConfig
from jaxserve.core.messages import (
    Abort,
    Failed,
    Gauges,
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
)
from jaxserve.core.replicas import ReplicatedCore

GAUGES = Gauges(*range(12))
READY = Ready("cpu", "cpu", 128, 40, "cpu_xla", "xla")


class ScriptedCore:
    """A core that says what a test tells it to, and keeps what it is told."""

    def __init__(self) -> None:
        self.commands: list[Message] = []
        self._said: queue.SimpleQueue[Message | None] = queue.SimpleQueue()

    def send(self, command: Message) -> None:
        self.commands.append(command)
        if isinstance(command, Shutdown):
            self._said.put(None)

    def say(self, message: Message) -> None:
        self._said.put(message)

    def receive(self) -> Message | None:
        return self._said.get()

    @property
    def is_heard_out(self) -> bool:
        return self._said.empty()

    def join(self) -> None:
        pass

    def kill(self) -> None:
        self._said.put(None)


@pytest.fixture
def cores() -> list[ScriptedCore]:
    return [ScriptedCore(), ScriptedCore()]


@pytest.fixture
def group(cores: list[ScriptedCore]) -> ReplicatedCore:
    return ReplicatedCore(EngineConfig(slots=4, replicas=2), cores)


def submit(handle: int, forks: int = 0) -> Submit:
    numbers = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    penalties = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    rest = {
        "seed": 0,
        "logit_bias": {},
        "logprobs": -1,
        "priority": 0,
        "cache_salt": "",
        "arrival": 0.0,
        "deadline": None,
    }
    return Submit(handle, [1], 8, 0, [], **numbers, **penalties, **rest, fork_seeds=[0] * forks)


def handles(core: ScriptedCore) -> list[int]:
    return [command.handle for command in core.commands if isinstance(command, Submit)]


def output(*ended: int, record: StepRecord | None = None) -> StepOutput:
    outputs = [SequenceOutput(handle, [], None, finish_reason="length") for handle in ended]
    return StepOutput([], [], outputs, GAUGES, record)


def test_a_request_goes_to_the_replica_with_the_fewest_sequences(group: ReplicatedCore, cores: list[ScriptedCore]):
    group.send(submit(0, forks=2))  # three sequences
    for handle in (3, 4, 5):
        group.send(submit(handle))
    assert handles(cores[0]) == [0] and handles(cores[1]) == [3, 4, 5]
    cores[1].say(output(3, 4))
    assert group.receive() is not None
    group.send(submit(6))
    assert handles(cores[1]) == [3, 4, 5, 6]
    cores[1].say(StepOutput([], [], [SequenceOutput(handle, [9], None) for handle in (5, 6)], GAUGES, None))
    assert group.receive() is not None
    for handle in (7, 8):
        group.send(submit(handle))
    assert handles(cores[1]) == [3, 4, 5, 6, 7] and handles(cores[0]) == [0, 8]


def test_an_abort_goes_to_the_owner_alone_and_to_nobody_once_it_has_ended(
    group: ReplicatedCore, cores: list[ScriptedCore]
):
    group.send(submit(0, forks=1))
    group.send(submit(2))
    group.send(Abort(2))
    cores[0].say(output(0))
    assert group.receive() is not None
    group.send(Abort(0, 2))  # its second sequence goes on
    cores[0].say(output(1))
    assert group.receive() is not None
    group.send(Abort(0, 2))
    assert [command for command in cores[0].commands if isinstance(command, Abort)] == [Abort(0, 2)]
    assert [command for command in cores[1].commands if isinstance(command, Abort)] == [Abort(2)]


def test_it_is_ready_when_all_replicas_are_with_their_pages_together(group: ReplicatedCore, cores: list[ScriptedCore]):
    cores[1].say(Progress("compiling", 0.1))  # the first replica speaks for all
    cores[1].say(READY)
    cores[0].say(Progress("compiling", 0.5))
    assert group.receive() == Progress("compiling", 0.5)
    cores[0].say(Ready("cpu", "cpu", 100, 30, "cpu_xla", "xla"))
    assert group.receive() == Ready("cpu", "cpu", 100, 70, "cpu_xla", "xla")


def test_gauges_are_summed_and_slots_numbered_through_all_replicas(group: ReplicatedCore, cores: list[ScriptedCore]):
    cores[0].say(output())
    first = group.receive()
    assert isinstance(first, StepOutput) and first.gauges == GAUGES
    cores[1].say(output(record=StepRecord(1, 2, 0, 0.0, 1.0, 0.1, 0.9, [0], [1, 2], [3], [1], [2])))
    both = group.receive()
    assert isinstance(both, StepOutput) and both.record is not None
    assert both.gauges == Gauges(*(2 * number for number in range(12)))
    assert (both.record.given_slots, both.record.taken_slots, both.record.freed_slots) == ([4], [5, 6], [7])
    assert (both.record.slots, both.record.prompt_slots, both.record.replica) == ([5], [6], 1)


def test_a_replica_that_fails_ends_them_all(group: ReplicatedCore, cores: list[ScriptedCore]):
    cores[1].say(Failed("gone"))
    assert group.receive() == Failed("gone")
    assert group.receive() is None
    assert Shutdown() in cores[0].commands


def test_a_trace_is_taken_once_and_told_of(group: ReplicatedCore, cores: list[ScriptedCore]):
    group.send(Profile("folder", 1.0))
    assert (cores[0].commands, cores[1].commands) == ([Profile("folder", 1.0)], [])
    cores[0].say(Profiled(None))
    assert group.receive() == Profiled(None)


def test_a_replica_that_cannot_be_heard_ends_them_all(group: ReplicatedCore, cores: list[ScriptedCore]):
    cores[1].say(submit(0))  # no core says such a thing
    cores[1].say(output(3))
    failed = group.receive()
    assert isinstance(failed, Failed) and "replica 1 cannot be heard: TypeError" in failed.error
    assert group.receive() is None
    group.join()
    assert [core.commands for core in cores] == [[Shutdown()], [Shutdown()]]
    assert all(core.is_heard_out for core in cores), "a core may wait for room to say that it has ended"


def test_each_replica_with_work_is_watched_by_its_own_steps(group: ReplicatedCore, cores: list[ScriptedCore]):
    assert group.steps_at_work() == {}
    group.send(submit(0))
    group.send(submit(1))
    before = group.steps_at_work()
    assert list(before) == [0, 1]
    cores[1].say(replace(output(), gauges=replace(GAUGES, steps=8)))
    assert group.receive() is not None
    after = group.steps_at_work()
    assert after[0] is before[0] and after[1] is not before[1]
    cores[0].say(output(0))
    assert group.receive() is not None
    assert list(group.steps_at_work()) == [1]


def test_shutdown_reaches_every_replica(group: ReplicatedCore, cores: list[ScriptedCore]):
    group.send(Shutdown())
    assert group.receive() is None
    group.join()
    assert [core.commands for core in cores] == [[Shutdown()], [Shutdown()]]
