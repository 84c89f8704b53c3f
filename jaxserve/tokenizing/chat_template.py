"""Chat messages to a prompt, by the template that came with the model, run where it can do no harm."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from jaxserve.limited_process import LimitedProcess, LimitReached
from jaxserve.request_errors import EngineUnavailable

_PROGRAM = ("-m", "jaxserve.tokenizing.chat_template_process")


def has_tools(template: str | None) -> bool:
    """Whether a chat template, in Jinja, tells the model of the tools that it is given."""
    return template is not None and re.search(r"\btools\b", template) is not None


class ChatTemplateError(ValueError):
    """A chat template refused its messages, is at fault, or went beyond a limit."""


@dataclass(frozen=True)
class RenderLimits:
    """What rendering one chat may take."""

    cpu_seconds: float = 0.5
    """Seconds of processor time, so that the refusal comes within one: a busy machine does not count."""
    memory_bytes: int = 512 << 20
    """Address space of the renderer, the interpreter's 50 MiB included."""
    max_characters: int = 16 << 20
    """Length of the text."""


class ChatTemplate:
    """A model's chat template. Thread-safe; one chat is rendered at a time.

    The template runs in a process of its own, started by `start` or the first chat: a loop without end, or one
    operation that fills the memory, cannot be stopped in this one. A warm chat takes a fraction of a millisecond.

    Args:
        source: in Jinja.
        special_tokens: texts by the name that the template uses, as `bos_token`.
        limits: beyond which rendering fails.
        tool_source: taken in place of `source` for chats with tools; None where that one is for both.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        limits: RenderLimits | None = None,
        tool_source: str | None = None,
    ):
        settings = {
            "template": source,
            "tool_template": source if tool_source is None else tool_source,
            "variables": dict(special_tokens),
            **asdict(limits or RenderLimits()),
        }
        self._renderer = LimitedProcess(_PROGRAM, settings)

    def start(self) -> None:
        """Starts the renderer, so that the first chat need not wait for it. What it makes of no messages, an error
        perhaps, does not matter, and the first chat tries again."""
        with suppress(ChatTemplateError, EngineUnavailable):
            self.render([])

    def stop(self) -> None:
        """Ends the renderer; the next chat starts it again."""
        self._renderer.stop()

    def render(self, messages: Sequence[Mapping[str, object]], tools: Sequence[Mapping[str, object]] = ()) -> str:
        """The prompt for a chat, up to where the assistant's answer begins. `tools` are functions that the model may
        call, as JSON schemas; a template without tools leaves them out.

        Raises ChatTemplateError, and EngineUnavailable where no process can be had that renders.
        """
        try:
            chat = json.dumps({"messages": list(messages), "tools": list(tools) or None})
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"chat template: messages must be JSON values: {error}") from error
        try:
            reply = self._renderer.ask(chat)
        except LimitReached as limit:
            raise ChatTemplateError(f"chat template: {limit}") from None
        if "error" in reply:
            raise ChatTemplateError(f"chat template: {reply['error']}")
        return reply["text"]
