"""What passes between front and core arrives whole, in order, and never more of it than the front can take."""

import socket
import threading
from collections.abc import Iterator

import pytest

from jaxserve.core.channel import MessageSocket, Outbox
from jaxserve.core.messages import Gauges, Progress, SequenceOutput, StepOutput, StepRecord, decode, encode

GAUGES = Gauges(*range(12))


@pytest.fixture
def linked() -> Iterator[tuple[MessageSocket, MessageSocket]]:
    here, there = socket.socketpair()
    with here, there:
        yield MessageSocket(here), MessageSocket(there)


def test_strings_of_any_length_arrive_in_order(linked: tuple[MessageSocket, MessageSocket]):
    here, there = linked
    strings = [b"", b"a", b"b" * 3_000_000, b"", b"c" * 70_000]
    sender = threading.Thread(target=lambda: [here.send_bytes(string) for string in strings])
    sender.start()
    assert [there.recv_bytes() for _ in strings] == strings
    sender.join()


def test_a_closed_end_is_the_end_of_the_stream_even_within_a_string():
    here, there = socket.socketpair()
    with here:
        here.sendall(b"\x00\x00\x00\x09only")
    with there, pytest.raises(EOFError):
        MessageSocket(there).recv_bytes()


def test_the_outbox_takes_no_more_than_its_limit_and_says_how_long_it_waited():
    outbox = Outbox(2)
    assert [outbox.put(Progress("loading", None)) for _ in range(2)] == [0.0, 0.0]
    waits: list[float] = []
    putting = threading.Thread(target=lambda: waits.append(outbox.put(Progress("third", None))))
    putting.start()
    putting.join(0.05)
    assert putting.is_alive(), "the third message found room"
    outbox.get()
    putting.join()
    assert waits[0] > 0.0
    outbox.close()
    assert [outbox.get() for _ in range(3)] == [Progress("loading", None), Progress("third", None), None]


def test_every_kind_of_output_survives_encoding():
    others = [
        SequenceOutput(3, [9], None, started=0, times=(1.0, 2.0, 2.0)),
        SequenceOutput(4, [9], [(9, -0.5, [(9, -0.5), (8, -1.5)])]),
        SequenceOutput(5, [], None, finish_reason="stop", matched_stop=2, completion_tokens=4, times=(1.0, 2.0, 3.0)),
        SequenceOutput(6, [], None, finish_reason="error", error="not finite"),
    ]
    record = StepRecord(7, 6, 0, 1.0, 2.0, 0.1, 0.2, [1], [2], [3])
    got = decode(encode(StepOutput([0, 1, 2], [1, 2, 3], others, GAUGES, record)))
    assert isinstance(got, StepOutput)
    assert (got.gauges, got.record) == (GAUGES, record)
    by_handle = {output.handle: output for output in got.outputs}
    assert (got.handles, got.tokens) == ([0, 1, 2], [1, 2, 3])
    # msgpack has lists where there were tuples
    assert by_handle[3].started == 0 and by_handle[3].times is not None and tuple(by_handle[3].times) == (1.0, 2.0, 2.0)
    assert by_handle[4].logprobs is not None and by_handle[4].logprobs[0][1] == -0.5
    assert (by_handle[5].finish_reason, by_handle[5].matched_stop, by_handle[5].completion_tokens) == ("stop", 2, 4)
    assert by_handle[6].error == "not finite"


def test_a_queue_change_has_no_record():
    ended = SequenceOutput(1, [], None, finish_reason="abort")
    got = decode(encode(StepOutput([], [], [ended], GAUGES, None)))
    assert isinstance(got, StepOutput) and got.record is None and got.outputs == [ended]
