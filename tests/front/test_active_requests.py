"""A request is found by a failure or an abort from the moment that it is in."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from jaxserve.core.messages import Message, Submit
from jaxserve.engine import Engine
from jaxserve.events import Finished, FinishReason
from jaxserve.front.active_requests import ActiveRequest, ActiveRequests
from jaxserve.front.completion import collect
from jaxserve.front.request_stream import RequestStream
from jaxserve.request import Request, StoppingParams
from jaxserve.tokenizing.text_stream import TextStream


class _Slow(list[TextStream | None]):
    """One sequence's, given once it may go on."""

    def __init__(self) -> None:
        super().__init__([None])
        self.reached, self.may_go_on = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[TextStream | None]:
        self.reached.set()
        self.may_go_on.wait(60)
        return super().__iter__()


def test_a_request_that_is_being_taken_in_when_the_engine_fails_is_among_those_that_end() -> None:
    requests, texts = ActiveRequests(4), _Slow()
    request = Request(token_ids=(1,), request_id="a")
    sampling = (0.0, 1.0, 0, 0.0, 0.0, 0.0, 1.0, 0)
    submit = Submit(0, [1], 2, 0, [], *sampling, {}, -1, 0, "", 0.0, None)
    active = ActiveRequest(request, submit, RequestStream("a", lambda: None), 1)
    found: list[object] = []

    def fail() -> None:
        requests.fail("it is gone")
        found.extend(requests.all())

    adding = threading.Thread(target=requests.add, args=([(active, texts)],))
    failing = threading.Thread(target=fail)
    adding.start()
    texts.reached.wait()
    failing.start()
    failing.join(0.2)  # as far as it gets
    texts.may_go_on.set()
    adding.join()
    failing.join()
    assert len(found) == len(requests) == 1


def test_a_shutdown_may_wait_as_long_as_it_takes() -> None:
    with Engine(simulated_step_ms=1.0, slots=4, max_context=1024) as engine:
        stream = engine.submit(Request(token_ids=(1,), stopping=StoppingParams(max_tokens=50, ignore_eos=True)))
        assert engine.shutdown(float("inf"))
        assert collect(stream).finish_reason == "length"


def test_an_abort_of_a_request_that_is_not_sent_yet_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reached, may_go_on = threading.Event(), threading.Event()
    with Engine(simulated_step_ms=1.0, slots=4, max_context=1024) as engine, ThreadPoolExecutor(2) as threads:
        send = engine._core.send

        def slow(command: Message) -> None:
            if isinstance(command, Submit):
                reached.set()
                may_go_on.wait(60)
            send(command)

        monkeypatch.setattr(engine._core, "send", slow)
        stopping = StoppingParams(max_tokens=900, ignore_eos=True)
        request = Request(token_ids=(300,), stopping=stopping, request_id="a")
        submitting = threads.submit(engine.submit, request)
        reached.wait()
        aborting = threads.submit(engine.abort, "a")
        wait([aborting], 0.2)  # as far as it gets
        may_go_on.set()
        assert aborting.result()
        reasons = [event.finish_reason for event in submitting.result() if isinstance(event, Finished)]
        assert reasons == [FinishReason.ABORT]
