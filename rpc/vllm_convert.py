"""Between the messages of `vllm.grpc.engine` (package smg-grpc-proto) and the plain data of `jaxserve.request`.

Defaults are those of the protocol's own adapter: an unset temperature is 1, and 0 stands for unset in top_p,
repetition_penalty and n. Answers carry token ids and no text, so `skip_special_tokens`, `spaces_between_special_tokens`
and `tokenized.original_text` change nothing; constraints always start at the first token, which is all that
`grammar_from_first_token` asks for.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import Message
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.events import Delta, Event, Finished, FinishReason, Started, TokenLogprob
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.request_errors import InvalidRequest
from rpc.convert import constraint_from_proto
from rpc.unknown_fields import refuse_unknown

_REQUEST_FIELDS = frozenset(("request_id", "tokenized", "text", "sampling_params", "stream", "data_parallel_rank"))
_SAMPLING_FIELDS = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"),
        *("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"),
        *("n", "logprobs", "prompt_logprobs", "seed", "logit_bias"),
        *("json_schema", "regex", "grammar", "json_object", "choice", "grammar_from_first_token"),
        *("skip_special_tokens", "spaces_between_special_tokens"),
    )
)


def _refuse_others(message: Message, supported: frozenset[str]) -> None:
    """Raises InvalidRequest for a field that is set and not among those: nothing is dropped in silence."""
    for descriptor, _ in message.ListFields():
        if descriptor.name not in supported:
            raise InvalidRequest(descriptor.name, "is not supported")


def request_from_vllm(message: pb.GenerateRequest, request_id: str, deadline: float | None = None) -> Request:
    """Builds the engine's request.

    Args:
        deadline: `time.monotonic()` seconds at which the call ends; None where it has none.

    Raises:
        InvalidRequest: for a field that is not supported.
    """
    refuse_unknown(message)
    _refuse_others(message, _REQUEST_FIELDS)
    params = message.sampling_params
    _refuse_others(params, _SAMPLING_FIELDS)
    if message.data_parallel_rank != 0:
        raise InvalidRequest("data_parallel_rank", f"must be 0, got {message.data_parallel_rank}")
    kind = message.WhichOneof("input")
    if params.HasField("prompt_logprobs") and kind == "text":
        # The answer names every prompt token, also the first, which has no log-probability.
        raise InvalidRequest("prompt_logprobs", "is supported with tokenized input alone")
    return Request(
        prompt=message.text if kind == "text" else None,
        token_ids=tuple(message.tokenized.input_ids) if kind == "tokenized" else None,
        sampling=SamplingParams(
            temperature=params.temperature if params.HasField("temperature") else 1.0,
            top_p=params.top_p or 1.0,
            top_k=params.top_k,
            min_p=params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            repetition_penalty=params.repetition_penalty or 1.0,
            seed=params.seed if params.HasField("seed") else None,
            logit_bias=dict(params.logit_bias),
            n=params.n or 1,
        ),
        stopping=StoppingParams(
            max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
            min_tokens=params.min_tokens,
            stop=tuple(params.stop),
            stop_token_ids=tuple(params.stop_token_ids),
            include_stop=params.include_stop_str_in_output,
            ignore_eos=params.ignore_eos,
        ),
        output=OutputParams(
            logprobs=params.logprobs if params.HasField("logprobs") else None,
            prompt_logprobs=params.prompt_logprobs if params.HasField("prompt_logprobs") else None,
            return_text=False,
        ),
        constraint=constraint_from_proto(params) if params.WhichOneof("constraint") else None,
        request_id=request_id,
        deadline=deadline,
    )


@dataclass
class _Sequence:
    """What has been generated of one output."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class ResponseBuilder:
    """Makes the messages of one Generate call: a chunk for each delta where it streams, a complete for each output."""

    def __init__(self, request: pb.GenerateRequest):
        self._request = request
        self._stream = request.stream
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._sequences: dict[int, _Sequence] = {}

    def messages(self, event: Event) -> list[pb.GenerateResponse]:
        """The messages of an event; none where the protocol has none: the call's status tells of failures."""
        match event:
            case Started():
                self._prompt_tokens, self._cached_tokens = event.prompt_tokens, event.cached_tokens
                self._prompt_logprobs = event.prompt_logprobs or ()
                return []
            case Delta():
                return self._add(event.index, event.token_ids, event.logprobs or ())
            case Finished(finish_reason=FinishReason.ERROR | FinishReason.DEADLINE):
                return []
            case Finished():
                return [*self._end_token(event), self._complete(event)]

    def _end_token(self, finished: Finished) -> list[pb.GenerateResponse]:
        """The token that ended the sequence: part of the output in this protocol, and of no delta in the engine's."""
        generated = self._sequences.get(finished.index, _Sequence()).token_ids
        if not isinstance(finished.matched_stop, int) or len(generated) >= finished.usage.completion_tokens:
            return []
        return self._add(finished.index, (finished.matched_stop,), ())

    def _add(
        self, index: int, token_ids: tuple[int, ...], logprobs: Sequence[TokenLogprob]
    ) -> list[pb.GenerateResponse]:
        sequence = self._sequences.setdefault(index, _Sequence())
        is_first = not sequence.token_ids
        sequence.token_ids += token_ids
        if not self._stream:
            sequence.logprobs += logprobs
        if not self._stream or not token_ids:
            return []
        response = pb.GenerateResponse()
        chunk = response.chunk
        chunk.index = index
        chunk.token_ids.extend(token_ids)
        chunk.prompt_tokens = self._prompt_tokens
        chunk.cached_tokens = self._cached_tokens
        chunk.completion_tokens = len(sequence.token_ids)
        if logprobs:
            _add_logprobs(chunk.output_logprobs, logprobs)
        if is_first and self._prompt_logprobs:
            self._add_prompt_logprobs(chunk.input_logprobs)
        return [response]

    def _complete(self, finished: Finished) -> pb.GenerateResponse:
        sequence = self._sequences.get(finished.index, _Sequence())
        response = pb.GenerateResponse()
        complete = response.complete
        complete.index = finished.index
        complete.output_ids.extend(sequence.token_ids)
        complete.finish_reason = finished.finish_reason
        complete.prompt_tokens = finished.usage.prompt_tokens
        complete.completion_tokens = finished.usage.completion_tokens
        complete.cached_tokens = finished.usage.cached_tokens
        if isinstance(finished.matched_stop, str):
            complete.matched_stop_str = finished.matched_stop
        elif finished.matched_stop is not None:
            complete.matched_token_id = finished.matched_stop
        if sequence.logprobs:
            _add_logprobs(complete.output_logprobs, sequence.logprobs)
        if self._prompt_logprobs and not self._stream:
            self._add_prompt_logprobs(complete.input_logprobs)
        return response

    def _add_prompt_logprobs(self, message: pb.InputLogProbs) -> None:
        """Every prompt token stands there; the first, which nothing precedes, without a value."""
        message.token_ids.append(self._request.tokenized.input_ids[0])
        message.token_logprobs.add()
        message.top_logprobs.add()
        for entry in self._prompt_logprobs:
            message.token_ids.append(entry.token_id)
            message.token_logprobs.add(value=entry.logprob)
            _add_top(message.top_logprobs.add(), entry)


def _add_logprobs(message: pb.OutputLogProbs, logprobs: Sequence[TokenLogprob]) -> None:
    for entry in logprobs:
        message.token_ids.append(entry.token_id)
        message.token_logprobs.append(entry.logprob)
        _add_top(message.top_logprobs.add(), entry)


def _add_top(message: pb.TopLogProbs, entry: TokenLogprob) -> None:
    for token, logprob in entry.top:
        message.token_ids.append(token)
        message.values.append(logprob)


def zipped(files: Mapping[str, str]) -> bytes:
    """A zip archive of text files by name. The same files make the same bytes, on every replica."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as writer:
        for name, text in sorted(files.items()):
            writer.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    return archive.getvalue()
