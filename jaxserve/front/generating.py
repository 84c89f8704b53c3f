"""Generating within a program: one prompt as an asynchronous iterator, or a list of them, waiting for all."""

import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from jaxserve.events import Completion, Delta, Finished, FinishReason
from jaxserve.front.completion import collect
from jaxserve.front.event_reader import EventReader
from jaxserve.request import Request
from jaxserve.request_errors import InvalidRequest, QueueFull, TenantBusy

Prompt = str | Request | Mapping[str, Any]
"""Text, a request, or a mapping of a request's API names."""

Submit = Callable[[Request], EventReader]
"""`Engine.submit`."""

ROOM_INTERVAL = 0.02
"""Seconds between looks for room where requests of others take it."""


def request_of(prompt: Prompt, fields: Mapping[str, Any]) -> Request:
    """The request for a prompt with these fields. Raises InvalidRequest."""
    if isinstance(prompt, Request):
        if fields:
            raise InvalidRequest(next(iter(fields)), "a Request carries its own fields")
        return prompt
    if not isinstance(prompt, str | Mapping):
        raise InvalidRequest("prompt", f"must be text, a Request or a mapping of its fields, got {prompt!r:.100}")
    return Request.from_json({"prompt": prompt, **fields} if isinstance(prompt, str) else {**fields, **prompt})


async def generate_one(submit: Submit, request: Request) -> AsyncIterator[Delta]:
    """What is new, as it comes. Leaving the iterator ends the request. Raises RuntimeError where the engine failed, and
    where another ended the request, or its reader left too much unread: who reads deltas alone would take what there is
    for the whole."""
    stream = submit(request)
    try:
        async for event in stream:
            if isinstance(event, Delta):
                yield event
            elif isinstance(event, Finished) and event.error is not None:
                raise RuntimeError(event.error)
            elif isinstance(event, Finished) and event.finish_reason is FinishReason.ABORT:
                raise RuntimeError("the request was aborted, or its reader left more unread than is kept for one")
    finally:
        stream.cancel()


def generate_all(submit: Submit, capacity: int, requests: list[Request]) -> list[Completion]:
    """Waits for all, with no more than `capacity` sequences in flight at once, and for room where others take it. Ends
    all if one is refused."""
    streams: list[EventReader] = []
    completions: list[Completion] = []

    def collect_next() -> Completion:
        number = len(completions)
        return collect(streams[number], requests[number].output.logprobs is not None)

    try:
        for request in requests:
            while _sequences(requests[len(completions) : len(streams) + 1]) > capacity:
                if len(completions) == len(streams):
                    break  # it alone is too much, and `submit` says so
                completions.append(collect_next())
            stream = _submit_into_room(submit, request)
            stream.read_at_end()  # or else, while those before it are read, it seems to have a slow reader
            streams.append(stream)
        while len(completions) < len(streams):
            completions.append(collect_next())
    finally:
        for stream in streams[len(completions) :]:
            stream.cancel()
    return completions


def _sequences(requests: list[Request]) -> int:
    """How many the requests have, of which the last is not checked yet."""
    return sum(n if isinstance(n, int) else 1 for n in (request.sampling.n for request in requests))


def _submit_into_room(submit: Submit, request: Request) -> EventReader:
    """Submits as soon as there is room: whatever takes it now will end."""
    while True:
        try:
            return submit(request)
        except QueueFull as full:
            if isinstance(full, TenantBusy) and request.sampling.n > full.limit:
                raise  # it alone is too much
            time.sleep(ROOM_INTERVAL)
