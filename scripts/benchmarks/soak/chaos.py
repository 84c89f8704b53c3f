"""What a soak's clients do: requests of every kind, seeded, and clients that do not behave."""

import asyncio
import random
import socket
import struct
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass

from benchmarks.workload import random_prompts
from jaxserve.events import Delta, Finished, FinishReason
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.request_errors import EngineUnavailable, InvalidRequest, QueueFull
from rpc.client import AsyncClient

BAD_FIELDS: Sequence[dict[str, object]] = (
    {"temperature": float("nan")},
    {"top_p": 1.5},
    {"top_k": -2},
    {"max_tokens": 0},
    {"n": 1_000_000},
    {"token_ids": [2**31 - 1]},
    {"token_ids": []},
    {"stop": [""]},
    {"logprobs": 1000},
    {"seed": -1},
)
"""Requests that must be refused."""


@dataclass(frozen=True)
class Limits:
    """What the server takes."""

    vocab_size: int
    max_context: int
    max_n: int


class Chaos:
    """One client's doings on a server. What breaks a promise is noted in `broken`."""

    def __init__(self, client: AsyncClient, limits: Limits, seed: int):
        self._client = client
        self._limits = limits
        self._random = random.Random(seed)
        self.done: Counter[str] = Counter()
        """How often each thing was done."""
        self.broken: list[str] = []
        self._doings: dict[str, tuple[float, Callable[[], Awaitable[None]]]] = {
            "complete": (6.0, self._complete),
            "cancel": (2.0, self._cancel),
            "abort": (1.0, self._abort),
            "deadline": (1.0, self._deadline),
            "bad": (1.5, self._bad),
            "slow": (0.5, self._slow),
            "reset": (0.5, self._reset),
        }

    async def run(self, until: float) -> None:
        """Does one thing after another until a monotonic second."""
        names, doings = list(self._doings), list(self._doings.values())
        while time.monotonic() < until:
            index = self._random.choices(range(len(names)), [weight for weight, _ in doings])[0]
            try:
                await doings[index][1]()
            except QueueFull as full:
                self.done["refused"] += 1
                await asyncio.sleep(min(full.retry_after, 1.0))
            except Exception as error:
                self.broken.append(f"{names[index]}: {type(error).__name__}: {error}")
                if isinstance(error, EngineUnavailable):
                    await asyncio.sleep(0.5)
            self.done[names[index]] += 1

    def _request(self, longest_output: int = 64) -> Request:
        """A request that is valid, of any kind."""
        random_ = self._random
        output = random_.randint(1, longest_output)
        length = min(int(random_.lognormvariate(3.5, 1.0)) + 1, self._limits.max_context - longest_output)
        # Some prompts begin alike, so that the prefix cache has hits.
        seed = random_.randrange(4) if random_.random() < 0.3 else random_.getrandbits(32)
        (token_ids,) = random_prompts(1, length, self._limits.vocab_size, seed)
        greedy = random_.random() < 0.5
        sampling = SamplingParams(
            temperature=0.0 if greedy else random_.choice((0.7, 1.0, 1.5)),
            top_p=1.0 if greedy else random_.choice((1.0, 0.9)),
            seed=random_.getrandbits(32),
            frequency_penalty=random_.choice((0.0, 0.0, 0.5)),
            n=random_.randint(1, self._limits.max_n),
        )
        return Request(
            token_ids=token_ids,
            sampling=sampling,
            stopping=StoppingParams(max_tokens=output, ignore_eos=random_.random() < 0.7),
            output=OutputParams(logprobs=random_.choice((None, None, None, 0, 3))),
            priority=random_.choice((0, 0, 0, 1, -1)),
            request_id=uuid.uuid4().hex,
        )

    async def _complete(self, request: Request | None = None, pace: float = 0.0) -> None:
        request = request or self._request()
        tokens: Counter[int] = Counter()
        endings: dict[int, Finished] = {}
        async with aclosing(self._client.generate(request).events()) as events:
            async for event in events:
                if isinstance(event, Delta):
                    tokens[event.index] += len(event.token_ids)
                    if event.index in endings:
                        self.broken.append(f"complete: tokens after the end of sequence {event.index}")
                elif isinstance(event, Finished):
                    if event.index in endings:
                        self.broken.append(f"complete: two terminal messages of sequence {event.index}")
                    endings[event.index] = event
                await asyncio.sleep(pace)
        self._check(request, tokens, endings)

    def _check(self, request: Request, tokens: Counter[int], endings: dict[int, Finished]) -> None:
        if sorted(endings) != list(range(request.sampling.n)):
            self.broken.append(f"complete: terminal messages of {sorted(endings)}, n is {request.sampling.n}")
        for ending in endings.values():
            if ending.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
                self.broken.append(f"complete: finish reason {ending.finish_reason}: {ending.error}")
        # An end-of-sequence token counts in usage and is not in the messages.
        counted = sum(ending.usage.completion_tokens for ending in endings.values())
        unseen = sum(ending.finish_reason is FinishReason.STOP for ending in endings.values())
        if not sum(tokens.values()) <= counted <= sum(tokens.values()) + unseen:
            self.broken.append(f"complete: {sum(tokens.values())} tokens in messages, {counted} in usage")

    async def _slow(self) -> None:
        await self._complete(self._request(16), pace=self._random.uniform(0.01, 0.2))

    async def _cancel(self) -> None:
        wanted, count = self._random.randrange(20), 0
        async with aclosing(self._client.generate(self._request()).events()) as events:
            async for event in events:
                count += len(event.token_ids) if isinstance(event, Delta) else 0
                if count >= wanted:
                    return

    async def _abort(self) -> None:
        generation = self._client.generate(self._request())
        reading = asyncio.create_task(generation.text())
        await asyncio.sleep(self._random.uniform(0.0, 0.3))
        await self._client.abort(generation.request_id)
        await self._client.abort(generation.request_id)  # of a finished or an ending one
        await reading
        if generation.finished is None:
            self.broken.append("abort: no terminal message")

    async def _deadline(self) -> None:
        with suppress(TimeoutError):  # which it should be, unless the request was quick
            await self._client.generate(self._request(), timeout=self._random.uniform(0.001, 0.5)).text()

    async def _bad(self) -> None:
        fields = {"token_ids": [300], **self._random.choice(BAD_FIELDS)}
        try:
            await self._client.generate(fields).text()
        except InvalidRequest:
            return
        self.broken.append(f"bad: {fields} was not refused")

    async def _reset(self) -> None:
        """A connection that is cut: with a call on it, or in the middle of what is no message."""
        if self._random.random() < 0.5:
            async with AsyncClient(self._client.address) as other:
                generation = other.generate(self._request())
                reading = asyncio.ensure_future(generation.text())
                await asyncio.sleep(self._random.uniform(0.0, 0.2))
            await asyncio.gather(reading, return_exceptions=True)
            return
        host, _, port = self._client.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self._random.randbytes(self._random.randrange(64)))
        # Closed with a reset: what was written may be lost on the way.
        end = writer.get_extra_info("socket")
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()


async def limits_of(client: AsyncClient) -> Limits:
    """What a server takes, as it says; of `n`, what it turns out to take."""
    info = await client.model_info()
    probe = Request(token_ids=(300,), sampling=SamplingParams(n=3), stopping=StoppingParams(max_tokens=1))
    try:
        await client.generate(probe).text()
    except InvalidRequest:
        return Limits(info.vocab_size, info.max_context, 1)
    return Limits(info.vocab_size, info.max_context, 3)
