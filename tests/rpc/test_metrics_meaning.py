"""Each metric against a workload whose counts are known; the device is simulated, all else is real."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import pytest
from http_serving import http_serving, openai_client
from openai.types import Completion
from serving import eventually
from simulated import simulated_ids
from test_metrics import read_metrics

from jaxserve.engine import Engine

pytestmark = pytest.mark.asyncio

PAGE, PAGES, SLOTS = 16, 24, 2
LATENCIES = ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time")


class Watched:
    """A server with two slots and 23 pages, and what its metrics gained since the last look."""

    def __init__(self, engine: Engine, address: str, client):
        self.engine = engine
        self._address = address
        self._client = client
        self._before: dict[tuple[str, str], float] = {}

    def ask(self, tokens: int, first: int = 300, prompt: int = 40, **fields: object) -> Awaitable[Completion]:
        """Asks for so many tokens. Prompts with the same first token share their pages."""
        ids = list(range(first, first + prompt))
        body = {"ignore_eos": True, **fields}
        return self._client.completions.create(
            model=self.engine.model_name, prompt=ids, max_tokens=tokens, extra_body=body
        )

    async def now(self) -> dict[tuple[str, str], float]:
        return await read_metrics(self._address)

    async def gained(self) -> dict[tuple[str, str], float]:
        # Statistics are written just after the last token is given away, by another thread.
        await eventually(lambda: self.engine.loads().running + self.engine.loads().waiting == 0)
        await asyncio.sleep(0.05)
        now, before = await self.now(), self._before
        self._before = now
        return {key: value - before.get(key, 0.0) for key, value in now.items()}


@asynccontextmanager
async def watched(**fields: object) -> AsyncIterator[Watched]:
    settings = {"simulated_step_ms": 2.0, "slots": SLOTS, "max_context": 256, "page_size": PAGE, "num_pages": PAGES}
    engine = Engine(**{**settings, **fields})
    async with http_serving(engine) as (_, address), openai_client(address) as client:
        metrics = Watched(engine, address, client)
        await metrics.gained()
        yield metrics


async def test_counters_and_histograms_of_two_equal_requests_one_after_the_other() -> None:
    async with watched() as metrics:
        for _ in range(2):
            await metrics.ask(10)
        gained = await metrics.gained()
        loads = metrics.engine.loads()
    counts = {name: gained[name, ""] for name, label in gained if not label}
    assert (counts["prompt_tokens_total"], counts["generation_tokens_total"]) == (80, 20)
    # The second finds the two full pages of its 40 tokens.
    assert (counts["prefix_cache_queries_total"], counts["prefix_cache_hits_total"]) == (80, 2 * PAGE)
    assert gained["request_success_total", "length"] == 2
    assert sum(value for (name, _), value in gained.items() if name == "request_success_total") == 2
    assert counts["time_to_first_token_seconds_count"] == 2
    assert counts["inter_token_latency_seconds_count"] == 18
    assert {counts[f"{name}_seconds_count"] for name in LATENCIES} == {2}
    whole, *parts = (counts[f"{name}_seconds_sum"] for name in LATENCIES)
    assert whole == pytest.approx(sum(parts), abs=1e-6)
    queue, prefill, decode = parts
    assert queue + prefill <= counts["time_to_first_token_seconds_sum"]  # which ends with delivery
    assert decode >= 18 * 0.002 * 0.9
    assert counts["inter_token_latency_seconds_sum"] == pytest.approx(decode, rel=0.5)
    # The prompts' tokens but those found, and one a generated token.
    assert counts["iteration_tokens_total_sum"] == 80 - 2 * PAGE + 20
    assert counts["iteration_tokens_total_count"] == counts["host_step_seconds_count"] == loads.steps
    assert counts["host_step_seconds_sum"] > 0
    for name in ("num_preemptions_total", "compiles_after_warmup_total", "slot_reuse_lag_steps_count"):
        assert counts[name] == 0


async def test_gauges_while_more_requests_are_in_flight_than_there_are_slots() -> None:
    async with watched(simulated_step_ms=20.0) as metrics:
        tasks = [asyncio.ensure_future(metrics.ask(60, first=300 + 50 * number)) for number in range(3)]
        await eventually(lambda: metrics.engine.loads().running == 2)
        await eventually(lambda: metrics.engine.loads().waiting == 1)
        now = await metrics.now()
        assert (now["num_requests_running", ""], now["num_requests_waiting", ""]) == (2, 1)
        # Two requests hold 3 to 7 pages each, of the 23 that may be held.
        assert 6 / PAGES <= now["kv_cache_usage_perc", ""] <= 14 / (PAGES - 1)
        assert now["cache_config_info", ""] == 1
        await asyncio.gather(*tasks)
        gained = await metrics.gained()
    assert (gained["num_requests_running", ""], gained["num_requests_waiting", ""]) == (0, 0)
    assert gained["kv_cache_usage_perc", ""] == 0
    # The third waited for a slot, which it had within two steps.
    assert gained["slot_reuse_lag_steps_count", ""] == gained["slot_reuse_lag_steps_bucket", "2"] == 1
    assert gained["request_queue_time_seconds_sum", ""] > 30 * 0.02
    assert 0 <= gained["device_idle_ratio", ""] <= 1


async def test_preemptions_are_counted_where_the_pages_do_not_suffice() -> None:
    async with watched() as metrics:
        await asyncio.gather(*(metrics.ask(200, first=300 + 50 * number) for number in range(2)))
        gained = await metrics.gained()
        assert gained["num_preemptions_total", ""] == metrics.engine.loads().preemptions > 0
    assert (gained["generation_tokens_total", ""], gained["prompt_tokens_total", ""]) == (400, 80)
    assert gained["inter_token_latency_seconds_count", ""] == 398


async def test_endings_are_counted_by_their_reason_and_overrun_where_the_host_sees_the_end_late() -> None:
    async with watched() as metrics:
        stop = metrics.engine.tokenizer.decode(simulated_ids(40, 9)[8:])
        answer = await metrics.ask(50, stop=[stop])
        assert answer.choices[0].finish_reason == "stop" and answer.usage is not None
        gained = await metrics.gained()
        assert gained["request_success_total", "stop"] == 1
        assert gained["generation_tokens_total", ""] == answer.usage.completion_tokens <= 9
        assert 1 <= gained["overrun_tokens_total", ""] <= 3  # the steps in flight when the text was matched
        late = await metrics.ask(200, timeout=0.1)
        assert late.choices[0].finish_reason == "deadline"
        asking = asyncio.ensure_future(metrics.ask(200))
        await eventually(lambda: metrics.engine.loads().running == 1)
        asking.cancel()
        gained = await metrics.gained()
    assert (gained["request_success_total", "deadline"], gained["request_success_total", "abort"]) == (1, 1)
    assert gained["e2e_request_latency_seconds_count", ""] == 2
