"""Requests and events survive the way over the wire."""

import math
import time

import pytest

from jaxserve.events import (
    Completion,
    Delta,
    Event,
    Finished,
    FinishReason,
    Output,
    Started,
    Timings,
    TokenLogprob,
    Usage,
)
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.request_errors import InvalidRequest
from rpc.client.calls import LONGEST_CALL, prepare, seconds_until
from rpc.convert import (
    completion_from_proto,
    completion_to_proto,
    event_from_proto,
    event_to_proto,
    request_from_proto,
    request_to_proto,
)
from rpc.v1 import jaxserve_pb2 as pb

FULL = Request(
    prompt="naïve 🦜",
    sampling=SamplingParams(
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        min_p=0.125,
        presence_penalty=-1.5,
        frequency_penalty=1.5,
        repetition_penalty=1.25,
        seed=2**32 - 1,
        logit_bias={5: -100.0, 7: 1.5},
    ),
    stopping=StoppingParams(
        max_tokens=9, min_tokens=2, stop=("a", "b"), stop_token_ids=(3, 4), include_stop=True, ignore_eos=True
    ),
    output=OutputParams(logprobs=0, return_text=False, return_token_ids=False),
    request_id="r",
    model="m",
    priority=-3,
    cache_salt="tenant",
)


@pytest.mark.parametrize(
    "request_",
    [
        FULL,
        Request(token_ids=(1, 2, 3), request_id="r"),
        Request(messages=({"role": "user", "content": "hi"},), request_id="r"),
        Request(token_ids=(), request_id="r"),
        Request(messages=(), request_id="r"),
        Request(prompt="", request_id="r", sampling=SamplingParams(temperature=0.0, seed=0)),
    ],
)
def test_a_request_comes_back_as_it_went(request_: Request) -> None:
    message = pb.GenerateRequest.FromString(request_to_proto(request_).SerializeToString())
    assert request_from_proto(message) == request_


def test_the_ends_of_every_range_arrive_within_it() -> None:
    """A message has floats of 32 bits: 0.01 is a little less there."""
    least = SamplingParams(0.0, 1e-30, 0, 0.0, -2.0, -2.0, 0.01, seed=0, logit_bias={0: -100.0})
    most = SamplingParams(100.0, 1.0, 2**31 - 1, 1.0, 2.0, 2.0, 100.0, seed=2**32 - 1, logit_bias={9: 100.0}, n=4)
    for sampling in (least, most):
        message = pb.GenerateRequest.FromString(
            request_to_proto(Request(prompt="a", sampling=sampling)).SerializeToString()
        )
        request_from_proto(message).sampling.validate(vocab_size=10, max_n=4)


def test_tools_are_refused_for_no_field_carries_them() -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]}
    with pytest.raises(InvalidRequest) as caught:
        request_to_proto(Request.from_json(chat))
    assert caught.value.field == "tools"
    assert request_to_proto(Request.from_json({**chat, "tools": []})).HasField("messages")


def test_prompts_in_two_forms_are_refused_for_a_message_carries_one() -> None:
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    for prompt, fields, both in (("x", {"token_ids": [1]}, "token_ids"), (chat, {"prompt": "x"}, "messages")):
        with pytest.raises(InvalidRequest, match=f"exactly one of .* must be set; prompt and {both} are set"):
            prepare(prompt, fields, None)


def test_an_id_that_is_empty_is_refused_for_its_request_could_not_be_aborted() -> None:
    with pytest.raises(InvalidRequest, match="request_id: must be a string of 1 to 128 characters"):
        prepare("x", {"request_id": "", "resumable": True}, None)


def test_an_unset_field_takes_the_default_of_the_engine() -> None:
    request = request_from_proto(pb.GenerateRequest(text="a", request_id="r"))
    assert request == Request(prompt="a", request_id="r")


def test_a_zero_that_is_set_is_not_unset() -> None:
    message = pb.GenerateRequest(text="a", sampling=pb.Sampling(temperature=0, seed=0), output=pb.Output(logprobs=0))
    request = request_from_proto(message)
    assert request.sampling.temperature == 0.0
    assert request.sampling.seed == 0
    assert request.output.logprobs == 0
    assert request_from_proto(pb.GenerateRequest(text="a", stopping=pb.Stopping(max_tokens=0))).stopping.max_tokens == 0


USAGE, TIMINGS = Usage(10, 4, 3), Timings(0.25, 0.5, 1.0, 1.75, 0.75)


@pytest.mark.parametrize(
    "event",
    [
        Started("r", 10, 4, 2**32 - 1),
        Delta("r"),
        Delta("r", 1, (0, 5), "ö", (TokenLogprob(0, -0.5, ((0, -0.5), (9, -2.0))), TokenLogprob(5, -1.0))),
        Finished("r", 0, FinishReason.STOP, USAGE, TIMINGS, matched_stop="END"),
        Finished("r", 0, FinishReason.STOP, USAGE, TIMINGS, matched_stop=0),
        Finished("r", 2, FinishReason.ERROR, USAGE, TIMINGS, error="NaN"),
    ],
)
def test_an_event_comes_back_as_it_went(event: Event) -> None:
    assert event_from_proto(pb.GenerateResponse.FromString(event_to_proto(event).SerializeToString())) == event


def test_an_event_of_a_newer_server_is_passed_over() -> None:
    assert event_from_proto(pb.GenerateResponse(request_id="r")) is None


def test_log_probabilities_that_were_asked_for_are_none_of_them_where_there_are_none() -> None:
    """As an engine gives them: of an output without a token, and of a prompt of one."""
    usage, timings = Usage(1, 0, 1), Timings(0.0, 0.0, 0.0, 0.0)
    output = Output(0, (), "", (), FinishReason.STOP, 2)
    completion = Completion("id", (output,), usage, timings, seed=7, prompt_logprobs=())
    message = completion_to_proto(completion)
    assert completion_from_proto(message, pb.Output(logprobs=0, prompt_logprobs=1)) == completion
    unasked = completion_from_proto(message, pb.Output())
    assert (unasked.logprobs, unasked.prompt_logprobs) == (None, None)


def test_a_call_has_no_longer_than_grpc_can_be_told() -> None:
    for furthest, timeout in ((1e12, None), (None, math.inf)):
        _, deadline = prepare(Request(prompt="x", deadline=furthest), {}, timeout)
        seconds = seconds_until(deadline)
        assert seconds is not None and 0 < seconds <= LONGEST_CALL
    assert seconds_until(None) is None


def test_a_call_ends_at_the_first_of_its_timeout_and_its_requests_deadline() -> None:
    now = time.monotonic()
    assert prepare(Request(prompt="x", deadline=now + 50), {}, 1000)[1] == now + 50
    by_timeout = prepare(Request(prompt="x", deadline=now + 1000), {}, 50)[1]
    assert by_timeout is not None and by_timeout < now + 1000
    message, passed = prepare(Request(prompt="x"), {}, -math.inf)
    assert passed is not None and now <= passed <= time.monotonic()
    assert message.text == "x"
