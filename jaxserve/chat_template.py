"""Chat messages to a prompt, by the template that came with the model, run where it can do no harm."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_PROGRAM = Path(__file__).with_name("chat_template_process.py")
_PATIENCE = 30.0
"""Seconds after which a renderer that did not answer is ended: more than it needs on the busiest machine."""


class ChatTemplateError(ValueError):
    """A chat template refused its messages, is at fault, or went beyond a limit."""


@dataclass(frozen=True)
class RenderLimits:
    """What rendering one chat may take."""

    cpu_seconds: float = 1.0
    """Seconds of processor time: a busy machine does not count."""
    memory_bytes: int = 512 << 20
    """Address space of the renderer, the interpreter's 50 MiB included."""
    max_characters: int = 16 << 20
    """Length of the text."""


class ChatTemplate:
    """A model's chat template. Thread-safe; one chat is rendered at a time.

    The template runs in a process of its own, started with the first chat: a loop without end, or one operation that
    fills the memory, cannot be stopped in this one. A warm chat takes a fraction of a millisecond.

    Args:
        source: in Jinja.
        special_tokens: texts by the name that the template uses, as `bos_token`.
        limits: beyond which rendering fails.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], limits: RenderLimits | None = None):
        self.source = source
        self._limits = limits or RenderLimits()
        settings = {"template": source, "variables": dict(special_tokens), **asdict(self._limits)}
        self._settings = json.dumps(settings).encode() + b"\n"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] = (),
    ) -> str:
        """The prompt for a chat; with `add_generation_prompt`, up to where the assistant's answer begins. `tools` are
        functions that the model may call, as JSON schemas; a template without tools leaves them out.

        Raises ChatTemplateError.
        """
        try:
            chat = json.dumps(
                {
                    "messages": list(messages),
                    "add_generation_prompt": add_generation_prompt,
                    "tools": list(tools) or None,
                }
            )
        except (TypeError, ValueError) as error:
            raise ChatTemplateError(f"chat template: messages must be JSON values: {error}") from error
        with self._lock:
            reply = self._exchange(self._running(), chat.encode() + b"\n")
        if "error" in reply:
            raise ChatTemplateError(f"chat template: {reply['error']}")
        return reply["text"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        # -P: the program's folder is not a place to import from, where modules have names like `request`.
        process = subprocess.Popen([sys.executable, "-P", str(_PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._process = process
        self._end = weakref.finalize(self, _end, process)
        _write(process, self._settings)
        return process

    def _exchange(self, process: subprocess.Popen[bytes], chat: bytes) -> dict[str, str]:
        _write(process, chat)
        reply = _read_line(process, time.monotonic() + _PATIENCE)
        if reply is not None:
            return json.loads(reply)
        self._end()
        match -process.returncode:
            case signal.SIGPROF:
                why = f"takes more than {self._limits.cpu_seconds:g} s of processor time"
            case signal.SIGKILL:
                why = f"was ended: it did not answer within {_PATIENCE:g} s, or the machine ran out of memory"
            case _:
                why = f"made its renderer end with exit code {process.returncode}"
        return {"error": why}


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, as reading its answer will show


def _read_line(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """A line without its end; None where the process ended, or did not answer before the deadline."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    ready = select.poll()
    ready.register(descriptor, select.POLLIN)
    line = bytearray()
    while not line.endswith(b"\n"):
        if not ready.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        data = os.read(descriptor, 1 << 20)
        if not data:
            return None
        line += data
    return bytes(line)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
