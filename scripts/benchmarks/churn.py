"""Work that keeps every slot of an engine taken while requests of many lengths come and go."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.latency import StreamTimes, follow
from benchmarks.steps import Interval
from benchmarks.workload import greedy_request, random_prompts
from jaxserve import Engine
from jaxserve.core.messages import StepRecord
from jaxserve.request import Request

PROMPT_LEN = 16
"""Tokens."""


@dataclass
class Work:
    """The requests of a run: prompts, most tokens of each, and for some a stop id that ends it."""

    prompts: list[tuple[int, ...]]
    lengths: list[int]
    stop_ids: list[tuple[int, ...]]

    @staticmethod
    def make(count: int, output_len: int, vocab_size: int) -> "Work":
        """Requests of half to one and a half times `output_len` tokens, without stop ids."""
        random_ = random.Random(count)
        lengths = [random_.randint(output_len // 2 + 1, output_len + output_len // 2) for _ in range(count)]
        return Work(random_prompts(count, PROMPT_LEN, vocab_size, seed=1), lengths, [()] * count)

    def requests(self, salt: str, return_text: bool) -> list[Request]:
        """The requests of one round; its salt keeps it from finding the pages of the rounds before."""
        return [
            greedy_request(prompt, length, stop_token_ids=stops, return_text=return_text, cache_salt=salt)
            for prompt, length, stops in zip(self.prompts, self.lengths, self.stop_ids, strict=True)
        ]

    def stop_every_other(self, streams: Sequence[StreamTimes]) -> None:
        """Makes the last token that every other request gave its stop id, and lets it run on if that did not come."""
        for index in range(0, len(streams), 2):
            self.stop_ids[index] = (streams[index].token_ids[-1],)
            self.lengths[index] *= 2


@dataclass
class Round:
    """What one pass of the work gave."""

    streams: list[StreamTimes]
    records: list[StepRecord]
    """Of all steps."""
    overrun_rows: int
    trace: list[Interval]


async def send_all(engine: Engine, requests: list[Request]) -> list[StreamTimes]:
    """Sends the requests together and reads their streams, in one event loop; the streams in the requests' order."""
    streams = []
    for request in requests:
        sent = time.monotonic()
        streams.append(follow(engine.submit(request), sent))
    return await asyncio.gather(*streams)


def run_round(engine: Engine, requests: list[Request], traced: bool = False) -> Round:
    """One pass of the work."""
    before = engine.loads()
    trace: list[Interval] = []
    if traced:
        from benchmarks.device_trace import trace_device

        with trace_device() as device:
            streams = asyncio.run(send_all(engine, requests))
        trace = device.intervals
    else:
        streams = asyncio.run(send_all(engine, requests))
    overrun = engine.loads().overrun_tokens - before.overrun_tokens
    return Round(streams, [r for r in engine.step_records if r.step > before.steps], overrun, trace)
