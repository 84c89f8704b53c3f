"""Two replicas behind the gateway smg, asked by the OpenAI client; one is killed while it serves.

    scripts/cluster_demo [--model smollm2-135m] [--streams 8] [--output-len 48]

The same greedy chats run three times: with both replicas; with one killed in mid-stream; with the one that is left.
Ends with exit status 0 if and only if all of this was seen:

- with both, every chat finished, and each replica served some;
- of the kill, as many streams broke as the killed replica was serving, each after text that the first run had as well;
- every other stream ran on and gave exactly the text of the first run;
- afterwards every chat finished on the replica that was left, with exactly the text of the first run.
"""

import argparse
import asyncio
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx2
import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gateway import Gateway
from benchmarks.server import ServerProcess

from jaxserve.config import EngineConfig
from rpc.client import Client

QUESTIONS = (
    "What colour is the sky?",
    "Name three fruits.",
    "Write one sentence about the sea.",
    "Explain rain to a child.",
    "How does one make tea?",
    "Tell a short story about a lighthouse.",
    "Describe the history of the bicycle.",
    "Say hello in four languages.",
)

GATEWAY_OPTIONS = ("--policy", "round_robin", "--health-check-interval-secs", "1", "--health-failure-threshold", "1")
"""Requests go to the replicas in turn, and one that is gone is noticed within a second or two."""


@dataclass
class Chat:
    """One streamed answer."""

    text: str = ""
    chunks: int = 0
    is_finished: bool = False
    failure: str = ""
    """How the stream broke; empty where it did not."""


async def ask(client: openai.AsyncOpenAI, model: str, number: int, output_len: int, chat: Chat) -> None:
    """Streams one answer into `chat`. A broken stream is no error here."""
    question = QUESTIONS[number % len(QUESTIONS)]
    try:
        stream = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"{number + 1}. {question}"}],
            temperature=0.0,
            max_completion_tokens=output_len,
            stream=True,
            extra_body={"ignore_eos": True},  # every stream is long enough to be met in its middle
        )
        async for chunk in stream:
            for choice in chunk.choices:
                chat.text += choice.delta.content or ""
                chat.chunks += bool(choice.delta.content)
                chat.is_finished = chat.is_finished or choice.finish_reason is not None
    except (openai.APIError, httpx2.HTTPError) as error:
        chat.failure = " ".join(str(error).split()) or type(error).__name__
    if not chat.is_finished and not chat.failure:
        chat.failure = "the stream ended without a finish reason"


class Cluster:
    """Two replicas and a gateway, and what is asked of them."""

    def __init__(self, arguments: argparse.Namespace, stack: ExitStack):
        config = EngineConfig(
            model=arguments.model, slots=arguments.streams, max_context=1024, core="process", dtype="bfloat16"
        )
        self.replicas = [stack.enter_context(ServerProcess(config)) for _ in range(2)]
        addresses = [replica.address for replica in self.replicas]
        self.gateway = stack.enter_context(Gateway(addresses, *GATEWAY_OPTIONS))
        self.controls = [stack.enter_context(Client(address)) for address in addresses]
        self.model = self.controls[0].model_info().model
        self._streams: int = arguments.streams
        self._output_len: int = arguments.output_len

    def running(self, replica: int) -> int:
        """Requests that a replica works on."""
        loads = self.controls[replica].loads()
        return loads.running + loads.waiting

    async def run(self, kill: int | None = None) -> tuple[list[Chat], list[int]]:
        """All chats at once; kills a replica, if one is named, when every stream has begun.

        Returns:
            The chats, and the requests that each replica had when every stream had begun; 0 for one that is gone.
        """
        chats = [Chat() for _ in range(self._streams)]
        async with openai.AsyncOpenAI(base_url=f"{self.gateway.url}/v1", api_key="none", max_retries=0) as client:
            tasks = [
                asyncio.create_task(ask(client, self.model, number, self._output_len, chat))
                for number, chat in enumerate(chats)
            ]
            while not all(chat.chunks >= 2 or chat.failure for chat in chats):
                await asyncio.sleep(0.01)
            alive = [replica for replica in range(2) if self.replicas[replica].is_alive]
            shares = [await asyncio.to_thread(self.running, one) if one in alive else 0 for one in range(2)]
            if kill is not None:
                self.replicas[kill].kill()
            await asyncio.gather(*tasks)
        return chats, shares


def line(name: str, chats: list[Chat], shares: list[int]) -> str:
    """A row of the table."""
    finished = sum(chat.is_finished and not chat.failure for chat in chats)
    return f"{name:<30}{shares[0]:>9}{shares[1]:>9}{finished:>10}{len(chats) - finished:>8}"


def faults(first: list[Chat], second: list[Chat], third: list[Chat], shares: list[list[int]]) -> list[str]:
    """What was not as it must be."""
    found: list[str] = []
    if any(chat.failure for chat in first):
        found.append(f"with both replicas a chat failed: {[chat.failure for chat in first if chat.failure]}")
    if not all(shares[0]):
        found.append(f"a replica served nothing: {shares[0]}")
    broken = [number for number, chat in enumerate(second) if chat.failure]
    if len(broken) != shares[1][0] or not broken:
        found.append(f"{len(broken)} streams broke, and the killed replica served {shares[1][0]}")
    for number, chat in enumerate(second):
        is_right = first[number].text.startswith(chat.text) if chat.failure else first[number].text == chat.text
        if not is_right:
            found.append(f"stream {number} gave another text when a replica was killed")
    for number, chat in enumerate(third):
        if chat.failure or chat.text != first[number].text:
            found.append(f"stream {number} after the kill: {chat.failure or 'another text'}")
    return found


async def show(cluster: Cluster) -> list[str]:
    """Runs all and prints the table; returns what went wrong."""
    print(f"{'':<30}{'replica 1':>9}{'2':>9}{'finished':>10}{'broken':>8}")
    first, both = await cluster.run()
    print(line("both replicas", first, both), flush=True)
    second, killed = await cluster.run(kill=0)
    print(line("replica 1 killed in mid-stream", second, killed), flush=True)
    third, left = await cluster.run()
    print(line("the replica that is left", third, left), flush=True)
    failures = sorted({chat.failure for chat in second if chat.failure})
    print(f"\nWhat the clients of the broken streams were told: {'; '.join(failures)}")
    return faults(first, second, third, [both, killed, left])


def main() -> int:
    """Runs the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="as for `jaxserve serve`")
    parser.add_argument("--streams", type=int, default=8, help="chats at once")
    parser.add_argument("--output-len", type=int, default=48, help="tokens of each answer")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        print("starting two replicas and the gateway", file=sys.stderr)
        found = asyncio.run(show(Cluster(arguments, stack)))
    for fault in found:
        print(f"cluster_demo: {fault}", file=sys.stderr)
    if not found:
        print("Only the streams of the killed replica were touched.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
