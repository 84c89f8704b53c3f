"""`jaxserve chat`: a conversation, an answer at a time, on a terminal or through pipes."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TextIO

from jaxserve.commands.start import CommandError, ExitStatus, output_errors
from jaxserve.events import Delta, Finished, FinishReason
from jaxserve.front.event_reader import EventReader
from jaxserve.request import Request, SamplingParams, StoppingParams
from jaxserve.request_errors import InvalidRequest, RequestError

if TYPE_CHECKING:
    from jaxserve.engine import Engine

PROMPT = "> "
HELP = "Ctrl-C ends an answer, /clear starts over, Ctrl-D leaves."


@dataclass
class Conversation:
    """What was said, and how to go on.

    Attributes:
        engine: answers.
        sampling, stopping: of every answer.
        interactive: a person reads and types; else turns come from a pipe.
        output: takes the answers, each ended by a line end.
        errors: takes what is not an answer.
        system: instructions that precede the conversation; None for none.
    """

    engine: "Engine"
    sampling: SamplingParams
    stopping: StoppingParams
    interactive: bool
    output: TextIO
    errors: TextIO
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def run(self, lines: Iterator[str]) -> ExitStatus:
        """Answers each line, which is a turn of the user. Raises CommandError where the options are out of range or
        answers cannot be written."""
        self._check_options()
        status = ExitStatus.SUCCESS
        try:
            for line in lines:
                text = line.strip()
                if text == "/clear":
                    self.turns.clear()
                elif text and not self._answer(text):
                    status = ExitStatus.REQUESTS_FAILED
        except KeyboardInterrupt:
            status = ExitStatus.INTERRUPTED
        return ExitStatus.SUCCESS if self.interactive and status is ExitStatus.REQUESTS_FAILED else status

    def _check_options(self) -> None:
        """Raises CommandError for what no turn could be answered with."""
        model, most = self.engine.model_config, self.engine.max_context - 1
        try:
            self.sampling.validate(model.vocab_size, self.engine.max_n)
            self.stopping.validate(model.vocab_size, model.eos_ids)
        except InvalidRequest as error:
            raise CommandError(str(error)) from error
        for name, tokens in (("max_tokens", self.stopping.max_tokens), ("min_tokens", self.stopping.min_tokens)):
            if tokens is not None and tokens > most:
                raise CommandError(f"{name}: must be at most {most} in a context of {most + 1}, got {tokens}")

    def _answer(self, text: str) -> bool:
        """Asks, and prints the answer as it comes; whether there was one. A turn without one is forgotten."""
        self.turns.append({"role": "user", "content": text})
        try:
            stream = self._submit()
        except InvalidRequest as error:
            return self._forget(f"{error}. /clear starts over.")
        except RequestError as error:
            return self._forget(str(error))
        answer, finished = self._print(stream)
        self._say("\n")
        if finished.finish_reason is FinishReason.ERROR:
            return self._forget(finished.error or "the engine failed")
        self.turns.append({"role": "assistant", "content": answer})
        return True

    def _submit(self) -> EventReader:
        """Asks for an answer of max_tokens, or of as many as the conversation has left room for. Raises RequestError
        where it has left none."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        request = Request(messages=tuple(system + self.turns), sampling=self.sampling, stopping=self.stopping)
        try:
            return self.engine.submit(request)
        except InvalidRequest as error:
            if error.field != "max_tokens":
                raise
            return self.engine.submit(replace(request, stopping=replace(self.stopping, max_tokens=None)))

    def _forget(self, why: str) -> bool:
        self.turns.pop()
        print(why, file=self.errors, flush=True)
        return False

    def _say(self, text: str) -> None:
        with output_errors():
            print(text, end="", file=self.output, flush=True)

    def _print(self, stream: EventReader) -> tuple[str, Finished]:
        """Prints deltas to the end. SIGINT ends the answer; where there is no person to go on, the command too."""
        said: list[str] = []
        interrupted = False
        while True:
            try:
                for event in stream:
                    if isinstance(event, Delta):
                        said.append(event.text)
                        self._say(event.text)
                    elif isinstance(event, Finished):
                        if interrupted and not self.interactive:
                            raise KeyboardInterrupt
                        return "".join(said), event
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                stream.cancel()  # what follows is the rest of the stream, and its end


def typed_lines(errors: TextIO) -> Iterator[str]:
    """Lines that a person types, with the usual editing keys, until Ctrl-D."""
    import readline  # noqa: F401  input() edits lines with it

    print(HELP, file=errors)
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return


def piped_lines() -> Iterator[str]:
    """Lines of standard input, as they come; bytes that are no UTF-8 are replaced."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "replace")
