"""Between the messages of `jaxserve.v1` and the plain data of `jaxserve.request`, both ways.

Only shapes are converted here: the engine checks every value against its model's limits.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from google.protobuf.message import Message

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
from jaxserve.request import Constraint, OutputParams, Request, SamplingParams, StoppingParams, check_messages
from jaxserve.request_errors import InvalidRequest
from rpc.unknown_fields import refuse_unknown
from rpc.v1 import jaxserve_pb2 as pb

_SAMPLING_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
)
_STOPPING_SCALARS = ("max_tokens", "min_tokens", "include_stop", "ignore_eos")
_OUTPUT_SCALARS = ("logprobs", "prompt_logprobs", "resumable", "return_text", "return_token_ids")


def _set_fields(message: Message, names: Sequence[str]) -> dict[str, int | float | bool]:
    """The optional scalars that are set, so that the unset ones take the defaults of the dataclass."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def messages_from_proto(chat: pb.ChatMessages) -> tuple[dict[str, str], ...]:
    """Chat messages as the tokenizer's template takes them."""
    return tuple({"role": message.role, "content": message.content} for message in chat.messages)


def request_from_proto(message: pb.GenerateRequest, deadline: float | None = None) -> Request:
    """Builds the engine's request.

    Args:
        deadline: `time.monotonic()` seconds at which the call ends; None where it has none.

    Raises:
        InvalidRequest: for a constraint that is none, and a field that is not known.
    """
    refuse_unknown(message)
    kind = message.WhichOneof("prompt")
    identity = {"request_id": message.request_id} if message.request_id else {}
    return Request(
        prompt=message.text if kind == "text" else None,
        token_ids=tuple(message.token_ids.ids) if kind == "token_ids" else None,
        messages=messages_from_proto(message.messages) if kind == "messages" else None,
        sampling=SamplingParams(
            **_set_fields(message.sampling, _SAMPLING_SCALARS),  # pyright: ignore[reportArgumentType]
            logit_bias=dict(message.sampling.logit_bias),
        ),
        stopping=StoppingParams(
            **_set_fields(message.stopping, _STOPPING_SCALARS),  # pyright: ignore[reportArgumentType]
            stop=tuple(message.stopping.stop),
            stop_token_ids=tuple(message.stopping.stop_token_ids),
        ),
        output=OutputParams(**_set_fields(message.output, _OUTPUT_SCALARS)),  # pyright: ignore[reportArgumentType]
        constraint=constraint_from_proto(message.constraint) if message.HasField("constraint") else None,
        model=message.model or None,
        priority=message.priority,
        cache_salt=message.cache_salt,
        deadline=deadline,
        **identity,  # pyright: ignore[reportArgumentType]
    )


def constraint_from_proto(message: Message) -> Constraint:
    """The field that is set of a message's oneof `constraint`, in this protocol or vLLM's; none is for the engine to
    refuse."""
    kind = message.WhichOneof("constraint")
    if kind is None:
        return Constraint()
    value = getattr(message, kind)
    if kind == "choice":
        return Constraint(choice=tuple(value.choices))
    return Constraint(**{kind: value})


def _assign(field: str, assign: Callable[[], object]) -> None:
    """Runs one assignment to a message, and names the field where protobuf refuses the value."""
    try:
        assign()
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise InvalidRequest(field, str(error)) from None


def message_of[M: Message](kind: type[M], **fields: object) -> M:
    """A message with these fields. Raises InvalidRequest for a value that its field cannot carry."""
    message = kind()
    for name, value in fields.items():
        if value is None:  # which protobuf takes for a field that is left out
            raise InvalidRequest(name, "must not be None")
        _assign(name, lambda name=name, value=value: message.MergeFrom(kind(**{name: value})))
    return message


def messages_to_proto(messages: Iterable[Mapping[str, Any]]) -> pb.ChatMessages:
    """Inverse of `messages_from_proto`. Raises InvalidRequest for what is no chat message."""
    chat, given = pb.ChatMessages(), []
    _assign("messages", lambda: given.extend(messages))
    check_messages(given)
    _assign("messages", lambda: chat.messages.extend(pb.ChatMessage(**message) for message in given))
    return chat


def _assign_scalars(message: Message, params: object, defaults: object, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(params, name)
        if value is not None and value != getattr(defaults, name):
            _assign(name, lambda name=name, value=value: setattr(message, name, value))


def request_to_proto(request: Request) -> pb.GenerateRequest:
    """Builds the message of a request. Values equal to their default are left out; the deadline is the call's.

    Raises:
        InvalidRequest: for a value that its field cannot carry, and for what the API has no field for.
    """
    if request.tools:
        raise InvalidRequest("tools", "is not a field of the gRPC API; /v1/chat/completions takes it")
    model = "" if request.model is None else request.model
    scalars = {"request_id": request.request_id, "priority": request.priority, "cache_salt": request.cache_salt}
    message = message_of(pb.GenerateRequest, model=model, **scalars)
    if request.prompt is not None:
        _assign("prompt", lambda: setattr(message, "text", request.prompt))
    if request.token_ids is not None:
        message.token_ids.SetInParent()
        _assign("token_ids", lambda: message.token_ids.ids.extend(request.token_ids or ()))
    if request.messages is not None:
        message.messages.CopyFrom(messages_to_proto(request.messages))
    _assign_scalars(message.sampling, request.sampling, SamplingParams(), _SAMPLING_SCALARS)
    _assign("logit_bias", lambda: message.sampling.logit_bias.update(request.sampling.logit_bias))
    _assign_scalars(message.stopping, request.stopping, StoppingParams(), _STOPPING_SCALARS)
    _assign("stop", lambda: message.stopping.stop.extend(request.stopping.stop))
    _assign("stop_token_ids", lambda: message.stopping.stop_token_ids.extend(request.stopping.stop_token_ids))
    _assign_scalars(message.output, request.output, OutputParams(), _OUTPUT_SCALARS)
    if request.constraint is not None:
        _set_constraint(message.constraint, request.constraint)
    return message


def _set_constraint(message: pb.Constraint, constraint: Constraint) -> None:
    kind = constraint.kind
    value = getattr(constraint, kind)
    match kind:
        case "choice":
            _assign(kind, lambda: message.choice.choices.extend(value))
        case "json_schema":
            _assign(kind, lambda: setattr(message, kind, value if isinstance(value, str) else json.dumps(value)))
        case _:
            _assign(kind, lambda: setattr(message, kind, value))


def _logprobs_to_proto(logprobs: Sequence[TokenLogprob]) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            token_id=entry.token_id,
            logprob=entry.logprob,
            top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
        )
        for entry in logprobs
    ]


def _logprobs_from_proto(logprobs: Sequence[pb.TokenLogprob]) -> tuple[TokenLogprob, ...] | None:
    if not logprobs:
        return None
    return tuple(
        TokenLogprob(entry.token_id, entry.logprob, tuple((top.token_id, top.logprob) for top in entry.top))
        for entry in logprobs
    )


def event_to_proto(event: Event) -> pb.GenerateResponse:
    """One message of a stream. Deltas come first and are built in place: this runs once for every token."""
    response = pb.GenerateResponse(request_id=event.request_id)
    if isinstance(event, Delta):
        delta = response.delta
        delta.SetInParent()
        delta.index = event.index
        delta.token_ids.extend(event.token_ids)
        delta.text = event.text
        if event.logprobs:
            delta.logprobs.extend(_logprobs_to_proto(event.logprobs))
    elif isinstance(event, Started):
        response.started.SetInParent()
        response.started.prompt_tokens = event.prompt_tokens
        response.started.cached_tokens = event.cached_tokens
        response.started.seed = event.seed
        if event.prompt_logprobs:
            response.started.prompt_logprobs.extend(_logprobs_to_proto(event.prompt_logprobs))
    else:
        finished = response.finished
        finished.index = event.index
        finished.finish_reason = event.finish_reason
        _set_matched_stop(finished, event.matched_stop)
        finished.usage.CopyFrom(pb.Usage(**asdict(event.usage)))
        finished.timings.CopyFrom(pb.Timings(**asdict(event.timings)))
        finished.error = event.error or ""
    return response


def _set_matched_stop(message: pb.Finished | pb.GenerateOutput, matched: str | int | None) -> None:
    if isinstance(matched, str):
        message.stop_string = matched
    elif matched is not None:
        message.stop_token_id = matched


def _matched_stop(message: pb.Finished | pb.GenerateOutput) -> str | int | None:
    name = message.WhichOneof("matched_stop")
    return None if name is None else getattr(message, name)


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)


def _timings(timings: pb.Timings) -> Timings:
    return Timings(timings.queue, timings.prefill, timings.decode, timings.total, timings.first_token)


def event_from_proto(response: pb.GenerateResponse) -> Event | None:
    """The event in a message; None for an event of a newer server."""
    kind = response.WhichOneof("event")
    if kind == "delta":
        delta = response.delta
        return Delta(
            request_id=response.request_id,
            index=delta.index,
            token_ids=tuple(delta.token_ids),
            text=delta.text,
            logprobs=_logprobs_from_proto(delta.logprobs),
        )
    if kind == "started":
        started = response.started
        prompt_logprobs = _logprobs_from_proto(started.prompt_logprobs)
        return Started(response.request_id, started.prompt_tokens, started.cached_tokens, started.seed, prompt_logprobs)
    if kind == "finished":
        finished = response.finished
        return Finished(
            request_id=response.request_id,
            index=finished.index,
            finish_reason=FinishReason(finished.finish_reason),
            usage=_usage(finished.usage),
            timings=_timings(finished.timings),
            matched_stop=_matched_stop(finished),
            error=finished.error or None,
        )
    return None


def completion_to_proto(completion: Completion) -> pb.GenerateOnceResponse:
    """The answer that has all sequences."""
    response = pb.GenerateOnceResponse(
        request_id=completion.request_id,
        usage=pb.Usage(**asdict(completion.usage)),
        timings=pb.Timings(**asdict(completion.timings)),
        seed=completion.seed,
        prompt_logprobs=_logprobs_to_proto(completion.prompt_logprobs or ()),
    )
    for output in completion.outputs:
        message = response.outputs.add(
            index=output.index, token_ids=output.token_ids, text=output.text, finish_reason=output.finish_reason
        )
        message.logprobs.extend(_logprobs_to_proto(output.logprobs or ()))
        _set_matched_stop(message, output.matched_stop)
    return response


def completion_from_proto(response: pb.GenerateOnceResponse, wanted: pb.Output) -> Completion:
    """Inverse of `completion_to_proto`. `wanted`: of the request, for no message tells none from none asked for."""
    no_logprobs = () if wanted.HasField("logprobs") else None
    no_prompt_logprobs = () if wanted.HasField("prompt_logprobs") else None
    return Completion(
        request_id=response.request_id,
        outputs=tuple(
            Output(
                index=output.index,
                token_ids=tuple(output.token_ids),
                text=output.text,
                logprobs=_logprobs_from_proto(output.logprobs) or no_logprobs,
                finish_reason=FinishReason(output.finish_reason),
                matched_stop=_matched_stop(output),
            )
            for output in response.outputs
        ),
        usage=_usage(response.usage),
        timings=_timings(response.timings),
        seed=response.seed,
        prompt_logprobs=_logprobs_from_proto(response.prompt_logprobs) or no_prompt_logprobs,
    )
