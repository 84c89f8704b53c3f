"""From the events of a stream to the whole that they add up to."""

from dataclasses import replace

from jaxserve.events import Completion, Delta, Event, Finished, Output, Started, TokenLogprob
from jaxserve.front.event_reader import EventReader


class CompletionBuilder:
    """Gathers the events of one request.

    Args:
        request_id: of the request.
        with_logprobs: it asked for log-probabilities, which a sequence without a token has as well: none.
    """

    def __init__(self, request_id: str, with_logprobs: bool = False):
        self._request_id = request_id
        self._with_logprobs = with_logprobs
        self._started: Started | None = None
        self._deltas: dict[int, list[Delta]] = {}
        self._finished: dict[int, Finished] = {}

    def add(self, event: Event) -> None:
        """Takes the next event of the stream."""
        match event:
            case Started():
                self._started = event
            case Delta():
                self._deltas.setdefault(event.index, []).append(event)
            case Finished():
                self._finished[event.index] = event

    def build(self) -> Completion:
        """The whole, once every sequence has finished. The prompt counts once, the tokens of all sequences do."""
        assert self._finished, "a stream ended without Finished"
        usages = [finished.usage for finished in self._finished.values()]
        return Completion(
            request_id=self._request_id,
            outputs=tuple(self._output(self._finished[index]) for index in sorted(self._finished)),
            usage=replace(usages[-1], completion_tokens=sum(usage.completion_tokens for usage in usages)),
            timings=max((finished.timings for finished in self._finished.values()), key=lambda timings: timings.total),
            seed=None if self._started is None else self._started.seed,
            prompt_logprobs=None if self._started is None else self._started.prompt_logprobs,
        )

    def _output(self, finished: Finished) -> Output:
        deltas = self._deltas.get(finished.index, [])
        logprobs: list[TokenLogprob] | None = [] if self._with_logprobs else None
        for delta in deltas:
            if delta.logprobs is not None:
                logprobs = logprobs or []
                logprobs += delta.logprobs
        return Output(
            index=finished.index,
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            text="".join(delta.text for delta in deltas),
            logprobs=None if logprobs is None else tuple(logprobs),
            finish_reason=finished.finish_reason,
            matched_stop=finished.matched_stop,
            error=finished.error,
        )


def collect(stream: EventReader, with_logprobs: bool = False) -> Completion:
    """Reads a stream to its end. `with_logprobs`: its request asked for them."""
    builder = CompletionBuilder(stream.request_id, with_logprobs)
    for event in stream:
        builder.add(event)
    return builder.build()
