"""`jaxserve generate`: requests as JSON lines in, results as JSON lines out, each as soon as it is known.

a thread reads lines -> at most `engine.capacity` sequences in flight, a task a request -> a line of output
"""

import asyncio
import contextlib
import json
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from jaxserve.commands.start import CommandError, ExitStatus
from jaxserve.events import Completion, FinishReason, Output, TokenLogprob
from jaxserve.front.completion import CompletionBuilder
from jaxserve.front.event_reader import EventReader
from jaxserve.request import Request
from jaxserve.request_errors import InvalidRequest, RequestError

if TYPE_CHECKING:
    from jaxserve.engine import Engine

READ_AHEAD = 64
"""Lines read before there is room for their requests."""

Write = Callable[[Mapping[str, object]], None]
"""Writes one object as a line."""


@dataclass
class Line:
    """A line of the input.

    Attributes:
        number: from 1.
        data: what it holds, once it has been parsed.
    """

    number: int
    text: bytes
    data: Any = None

    @property
    def id(self) -> str | None:
        """The request's id as given, or one made of the line's number; None where it is no usable one."""
        given = self.data.get("id", self.data.get("request_id")) if isinstance(self.data, dict) else None
        if given is None:
            return f"line-{self.number}"
        return given if isinstance(given, str) else None

    def parse(self) -> Request:
        """The request. Raises InvalidRequest for what is wrong with any model."""
        try:
            self.data = json.loads(self.text.decode("utf-8-sig"))  # bytes, it would take in UTF-16 too
        except json.JSONDecodeError as error:
            raise InvalidRequest("request", f"is not JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise InvalidRequest("request", f"is not JSON: {error}") from None
        request = Request.from_json({"id": self.id, **self.data} if isinstance(self.data, dict) else self.data)
        try:
            request.validate()
        except InvalidRequest as error:
            if error.field == "request_id" and "request_id" not in self.data:
                raise InvalidRequest("id", error.reason) from None  # as the line calls it
            raise
        return request


@dataclass
class Summary:
    """What came of all lines."""

    done: int = 0
    """Requests that ran to an end of their own."""
    failed: int = 0
    """Lines refused, and requests that the engine failed."""
    tokens: int = 0
    interrupted: bool = False

    @property
    def status(self) -> ExitStatus:
        """The command's exit status."""
        if self.interrupted:
            return ExitStatus.INTERRUPTED
        return ExitStatus.REQUESTS_FAILED if self.failed else ExitStatus.SUCCESS


class BatchRun:
    """One run of the command. The first SIGINT reads no further and aborts what is in flight: each request still has
    its line, with what it had generated. A second one raises KeyboardInterrupt."""

    def __init__(self, engine: "Engine", write: Write):
        self.summary = Summary()
        self._engine = engine
        self._write = write
        self._room = asyncio.Semaphore(engine.capacity)
        """Sequences that may still come into the engine."""
        self._streams: set[EventReader] = set()
        self._lines_by_id: dict[str, int] = {}

    async def run(self, lines: Iterable[bytes]) -> Summary:
        """Serves every line. Raises CommandError where the input cannot be read, and what `write` raises."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.TaskGroup() as group:
                reading = group.create_task(self._submit_all(lines, group))
                loop.add_signal_handler(signal.SIGINT, self._interrupt, reading)
        except* (CommandError, OSError) as errors:
            raise errors.exceptions[0] from None
        finally:
            loop.remove_signal_handler(signal.SIGINT)
        return self.summary

    def _interrupt(self, reading: asyncio.Task[None]) -> None:
        """Ends the run early. Runs in the event loop."""
        self.summary.interrupted = True
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        reading.cancel()
        for stream in self._streams:
            stream.cancel()

    async def _submit_all(self, lines: Iterable[bytes], group: asyncio.TaskGroup) -> None:
        number = 0
        async for text in _read_in_thread(lines):
            number += 1
            if text.strip():
                line = Line(number, text)
                try:
                    request = line.parse()
                except RequestError as error:
                    self._refuse(line, error)
                    continue
                n = request.sampling.n
                # The engine refuses what is none of these.
                sequences = n if isinstance(n, int) and 1 <= n <= self._engine.max_n else 1
                for _ in range(sequences):
                    await self._room.acquire()
                group.create_task(self._serve(line, request, sequences))

    async def _serve(self, line: Line, request: Request, sequences: int) -> None:
        try:
            stream = self._submit(line, request)
        except RequestError as error:
            self._refuse(line, error)
        else:
            self._streams.add(stream)
            try:
                await self._collect(stream, request)
            finally:
                stream.cancel()
                self._streams.discard(stream)
        finally:
            for _ in range(sequences):
                self._room.release()

    def _submit(self, line: Line, request: Request) -> EventReader:
        before = self._lines_by_id.get(request.request_id)
        if before is not None:
            raise InvalidRequest("id", f"{request.request_id!r} is that of line {before}; ids must differ")
        stream = self._engine.submit(request)
        self._lines_by_id[request.request_id] = line.number
        return stream

    def _refuse(self, line: Line, error: RequestError) -> None:
        self.summary.failed += 1
        field = error.field if isinstance(error, InvalidRequest) else None
        self._write({"id": line.id, "line": line.number, "error": {"field": field, "message": str(error)}})

    async def _collect(self, stream: EventReader, request: Request) -> None:
        builder = CompletionBuilder(request.request_id)
        async for event in stream:
            builder.add(event)
        completion = builder.build()
        failed = any(output.finish_reason is FinishReason.ERROR for output in completion.outputs)
        self.summary.failed += failed
        self.summary.done += not failed
        self.summary.tokens += completion.usage.completion_tokens
        self._write(result_line(request, completion))


def result_line(request: Request, completion: Completion) -> dict[str, object]:
    """The line of a request: what it wanted sent back, and how it ended, for its one sequence or, under `outputs`, for
    each. Times are in seconds."""
    outputs = [_output(request, output) for output in completion.outputs]
    line: dict[str, object] = {"id": request.request_id}
    if request.sampling.n == 1:
        line |= outputs[0]
    else:
        line["outputs"] = [{"index": index, **output} for index, output in enumerate(outputs)]
    if completion.prompt_logprobs is not None:
        line["prompt_logprobs"] = [_logprob(entry) for entry in completion.prompt_logprobs]
    return line | {
        "seed": completion.seed,
        "usage": asdict(completion.usage),
        "timings": {name: round(seconds, 6) for name, seconds in asdict(completion.timings).items()},
    }


def _output(request: Request, output: Output) -> dict[str, object]:
    wanted = request.output
    fields: dict[str, object] = {}
    if wanted.return_token_ids:
        fields["token_ids"] = output.token_ids
    if wanted.return_text:
        fields["text"] = output.text
    fields |= {"finish_reason": output.finish_reason, "matched_stop": output.matched_stop}
    if wanted.logprobs is not None:
        fields["logprobs"] = [_logprob(entry) for entry in output.logprobs or ()]
    if output.error is not None:
        fields["error"] = {"field": None, "message": output.error}
    return fields


def _logprob(entry: TokenLogprob) -> dict[str, object]:
    top = [{"token_id": token_id, "logprob": logprob} for token_id, logprob in entry.top]
    return {"token_id": entry.token_id, "logprob": entry.logprob, "top": top}


async def _read_in_thread(lines: Iterable[bytes]) -> AsyncIterator[bytes]:
    """The lines, of which READ_AHEAD at most are read before they are wanted. A line may be long in coming (a pipe, a
    terminal), so a thread waits for it; it is a daemon, for nothing but the next line can wake it. Raises CommandError
    where the input cannot be read."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | OSError | None] = asyncio.Queue()
    room = threading.Semaphore(READ_AHEAD)

    def put(item: bytes | OSError | None) -> None:
        room.acquire()
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: the run has ended
            loop.call_soon_threadsafe(queue.put_nowait, item)

    def read() -> None:
        try:
            for line in lines:
                if loop.is_closed():
                    return  # the run was interrupted
                put(line)
            put(None)
        except OSError as error:
            put(error)

    threading.Thread(target=read, name="jaxserve-input", daemon=True).start()
    while (item := await queue.get()) is not None:
        if isinstance(item, OSError):
            raise CommandError(f"the input cannot be read: {item}")
        room.release()
        yield item


def run_batch(engine: "Engine", lines: Iterable[bytes], output: BinaryIO) -> ExitStatus:
    """Serves every line, and says on standard error what came of them. Raises CommandError, and OSError where a
    result cannot be written."""
    began = time.monotonic()
    summary = asyncio.run(BatchRun(engine, line_writer(output)).run(lines))
    seconds = time.monotonic() - began
    print(
        f"{summary.done} requests done, {summary.failed} failed; {summary.tokens} tokens in {seconds:.1f} s "
        f"({summary.tokens / seconds:.1f} tokens/s)",
        file=sys.stderr,
    )
    return summary.status


def line_writer(output: BinaryIO) -> Write:
    """Writes objects as JSON lines, each flushed. Text is not escaped, except for what UTF-8 cannot hold."""

    def write(line: Mapping[str, object]) -> None:
        # A lone surrogate, from the JSON of an id, becomes a backslash escape, which is JSON as well.
        output.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        output.flush()

    return write
