"""Starts a server, sends eight chat requests of very different lengths at once, shows their tokens as they stream.

    scripts/demo [--model smollm2-135m] [options of `jaxserve serve`]

A live view on a terminal, plain lines elsewhere. Ends by itself, with exit status 0 if every request was served and the
server stopped in good order.
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from jaxserve.events import Finished
from rpc.client import AsyncClient

CHATS: tuple[tuple[str, int], ...] = (
    ("Say hello.", 8),
    ("What colour is the sky?", 16),
    ("Name three fruits.", 24),
    ("Write one sentence about the sea.", 40),
    ("Explain rain to a child.", 72),
    ("How does one make tea?", 120),
    ("Tell a short story about a lighthouse.", 180),
    ("Describe the history of the bicycle.", 260),
)
"""What is asked, and the most tokens to answer with."""

REFRESH = 0.1
"""Seconds between two views on a terminal."""
PLAIN_LINE = 72
"""Characters that are gathered before they are printed elsewhere."""
STOP_LIMIT = 60.0
"""Seconds for the server to stop."""


@dataclass
class Chat:
    """One request and what has come of it. Times are in seconds since all were sent."""

    number: int
    question: str
    max_tokens: int
    text: str = ""
    tokens: int = 0
    first: float | None = None
    """First token."""
    end: float | None = None
    finished: Finished | None = None
    printed: int = 0
    """Characters of `text` that have been printed as plain lines."""

    @property
    def tokens_per_s(self) -> float:
        """From the first token to the last."""
        if self.first is None or self.end is None or self.tokens < 2:
            return 0.0
        return (self.tokens - 1) / (self.end - self.first)


def flat(text: str) -> str:
    """On one line, without what could steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


class LiveView:
    """A line a request, written over and over."""

    def __init__(self, chats: list[Chat]):
        self._chats = chats
        self._drawn = False

    async def run(self) -> None:
        """Draws until cancelled, and once more then."""
        try:
            while True:
                self._draw()
                await asyncio.sleep(REFRESH)
        finally:
            self._draw()

    def changed(self, chat: Chat) -> None:
        """A request has new text, or ended: the next drawing shows it."""

    def _draw(self) -> None:
        up = f"\x1b[{len(self._chats)}F" if self._drawn else ""
        width = shutil.get_terminal_size().columns
        print(up + "\n".join(f"\x1b[2K{self._line(chat, width)}" for chat in self._chats), flush=True)
        self._drawn = True

    def _line(self, chat: Chat, width: int) -> str:
        state = "waits" if chat.first is None else "runs" if chat.end is None else "done"
        head = f"{chat.number}  {state:5}  {chat.tokens:3}/{chat.max_tokens:<3}  "
        room = max(width - len(head) - 1, 0)
        text = flat(chat.text or chat.question)
        return head + (text if len(text) <= room else text[-room:] if room else "")


class PlainView:
    """A line whenever a request has gathered enough text for one, or has ended."""

    def __init__(self, chats: list[Chat]):
        self._chats = chats

    async def run(self) -> None:
        """Nothing is drawn by time."""

    def changed(self, chat: Chat) -> None:
        """Prints what is new."""
        while len(chat.text) - chat.printed >= PLAIN_LINE or (chat.end is not None and chat.printed < len(chat.text)):
            piece = chat.text[chat.printed : chat.printed + PLAIN_LINE]
            chat.printed += len(piece)
            print(f"[{chat.number}] {flat(piece)}", flush=True)
        if chat.end is not None:
            print(f"[{chat.number}] done after {chat.end:.2f} s: {chat.tokens} tokens", flush=True)


async def converse(client: AsyncClient, chat: Chat, view: LiveView | PlainView, began: float) -> None:
    """Sends a request and follows its stream."""
    messages = [{"role": "user", "content": chat.question}]
    generation = client.chat(messages, max_tokens=chat.max_tokens, temperature=0.7, top_p=0.9, seed=chat.number)
    async for delta in generation:
        if chat.first is None and delta.token_ids:
            chat.first = time.monotonic() - began
        chat.text += delta.text
        chat.tokens += len(delta.token_ids)
        view.changed(chat)
    chat.end = time.monotonic() - began
    chat.finished = generation.finished
    view.changed(chat)


async def run_chats(client: AsyncClient) -> tuple[list[Chat], float]:
    """All chats at once; those, and the seconds they took together."""
    chats = [Chat(number, *chat) for number, chat in enumerate(CHATS, start=1)]
    view = LiveView(chats) if sys.stdout.isatty() else PlainView(chats)
    drawing = asyncio.create_task(view.run())
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for chat in chats:
            group.create_task(converse(client, chat, view, began))
    seconds = time.monotonic() - began
    drawing.cancel()
    await asyncio.wait([drawing])
    return chats, seconds


def print_table(chats: list[Chat], seconds: float) -> None:
    """Who finished when, the first first."""
    print(f"\n{'request':>7}  {'prompt':>6}  {'tokens':>6}  {'first token':>11}  {'done':>7}  {'tokens/s':>8}  end")
    for chat in sorted(chats, key=lambda chat: chat.end or 0.0):
        assert chat.finished is not None and chat.first is not None and chat.end is not None
        prompt, reason = chat.finished.usage.prompt_tokens, chat.finished.finish_reason
        times = f"{chat.first:9.2f} s  {chat.end:5.2f} s  {chat.tokens_per_s:8.1f}"
        print(f"{chat.number:>7}  {prompt:>6}  {chat.tokens:>6}  {times}  {reason}")
    tokens = sum(chat.tokens for chat in chats)
    print(f"{len(chats)} requests at once: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s\n")


@asynccontextmanager
async def server(options: list[str]) -> AsyncIterator[tuple[Process, int]]:
    """`jaxserve serve` on a free port, ready; it is ended whatever happens. Its progress goes to this terminal."""
    command = ("-m", "jaxserve", "serve", "--grpc-port", "0", *options)
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=PIPE)
    try:
        port = int(str((await report(process, "listening"))["port"]))
        print(f"the server listens on port {port} and loads its model", flush=True)
        await report(process, "ready")
        yield process, port
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def report(process: Process, event: str) -> dict[str, object]:
    """The server's next report, which must be `event`. Exits where the server did."""
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        sys.exit(f"the server ended with exit status {await process.wait()}")
    values = json.loads(line)
    if values["event"] != event:
        sys.exit(f"the server reported {values} where {event} was expected")
    return values


async def main() -> int:
    """Runs the demo."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, options = parser.parse_known_args()
    async with server(options) as (process, port):
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            await client.wait_until_ready()
            chats, seconds = await run_chats(client)
        print_table(chats, seconds)
        process.send_signal(signal.SIGTERM)
        status = await asyncio.wait_for(process.wait(), STOP_LIMIT)
    print(f"the server stopped with exit status {status}; {time.monotonic() - began:.1f} s in all")
    return status


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except KeyboardInterrupt:
        sys.exit(130)
