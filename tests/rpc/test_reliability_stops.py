"""A stop string that lies across deltas: none of it leaks, and usage counts what was generated."""

import asyncio
from typing import TYPE_CHECKING

import pytest
from protocols import Ask, fronting
from serving import back_to_the_start, lent
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm_pb

from jaxserve.events import FinishReason
from rpc.client import AsyncClient

if TYPE_CHECKING:
    from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio

PROMPT = "The lighthouse keeper wrote down the weather every evening, and so"
GREEDY = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}


async def test_no_part_of_a_stop_string_across_tokens_leaks_and_usage_counts_to_its_last_token(
    engine: "Engine",
) -> None:
    (whole,) = await asyncio.to_thread(engine.generate, [PROMPT], **GREEDY)
    pieces = [engine.tokenizer.decode([token]) for token in whole.token_ids]
    ends = [len("".join(pieces[: count + 1])) for count in range(len(pieces))]
    assert "".join(pieces) == whole.text
    async with (
        fronting(lent(engine)) as front,
        AsyncClient(f"127.0.0.1:{front.server.port}") as client,
    ):
        server, stub = front.server, front.vllm.stub
        checked = 0
        for place in range(4, 40, 6):
            # From the middle of one token over a whole one into the next but one.
            begin, end = ends[place] - 1, ends[place + 1] + 1
            stop = whole.text[begin:end]
            if whole.text.index(stop) != begin:
                continue
            checked += 1
            generation = client.generate(PROMPT, stop=[stop], **GREEDY)
            deltas = [delta async for delta in generation]
            assert "".join(delta.text for delta in deltas) == whole.text[:begin]  # deltas only add: none showed more
            finished = generation.finished
            assert finished is not None
            assert (finished.finish_reason, finished.matched_stop) == (FinishReason.STOP, stop)
            count = next(number for number, at in enumerate(ends) if at >= end) + 1
            assert finished.usage.completion_tokens == count
            assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids[:count])
            params = vllm_pb.SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True, stop=[stop])
            request = vllm_pb.GenerateRequest(text=PROMPT, stream=True, sampling_params=params)
            *chunks, last = [response async for response in stub.Generate(request)]
            assert [token for one in chunks for token in one.chunk.token_ids] == list(whole.token_ids[:count])
            assert (last.complete.finish_reason, last.complete.matched_stop_str) == ("stop", stop)
            assert last.complete.completion_tokens == count
            stops = {"temperature": 0.0, "stop": [stop]}
            outcome = await front.http.run(Ask(text=PROMPT, max_tokens=48, fields=stops))
            assert (outcome.text, outcome.token_ids) == (whole.text[:begin], list(whole.token_ids[:count]))
            assert (outcome.reasons, outcome.usage) == (["stop"], count)
        assert checked >= 3
        await back_to_the_start(engine, server)
