"""The loop on the real device: nothing synchronises but the one read of a step, and the cache stays where it is."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripted_device import submit

from jaxserve.config import EngineConfig
from jaxserve.core.loop import StepLoop, build_step_loop
from jaxserve.core.messages import Message, SequenceOutput, Shutdown, StepOutput
from jaxserve.device import model_runner, page_copies
from jaxserve.device.page_copies import BLOCK, PageCopies

MODEL = str(Path(__file__).parents[1] / "fixtures" / "families" / "smollm2")
REQUESTS = 12


class Recorder:
    """Takes the loop's messages, and ends it when every request has ended."""

    def __init__(self) -> None:
        self.loop: StepLoop | None = None
        self.messages: list[StepOutput] = []
        self.ended: list[SequenceOutput] = []

    def publish(self, message: Message) -> float:
        if isinstance(message, StepOutput):
            self.messages.append(message)
            self.ended += [output for output in message.outputs if output.finish_reason is not None]
            if len(self.ended) == REQUESTS:
                assert self.loop is not None
                self.loop.commands.put(Shutdown())
        return 0.0


@pytest.fixture
def recorder() -> Recorder:
    """A loop in which requests sample, report logprobs, carry biases and give way to each other; it has yet to run."""
    recorder = Recorder()
    config = EngineConfig(
        model=MODEL, max_context=160, slots=6, small_slots=3, prefill_chunks=(16, 48), num_pages=18, page_size=16
    )
    recorder.loop = build_step_loop(config, recorder.publish)
    kinds = ({}, {"temperature": 0.7, "top_p": 0.9}, {"logprobs": 2}, {"logit_bias": {5: 2.0}, "presence_penalty": 0.5})
    for handle in range(REQUESTS):
        tokens = [(handle * 31 + index * 7) % 240 + 3 for index in range(10 + 3 * handle)]
        fields = {"token_ids": tokens, "max_length": len(tokens) + 60, **kinds[handle % 4]}
        recorder.loop.commands.put(submit(handle, **fields))
    return recorder


def test_every_transfer_of_the_loop_is_asked_for(recorder: Recorder):
    assert recorder.loop is not None
    runner, uploads = recorder.loop._runner, []

    def upload_first(program):
        """A step's one upload, which its program would take from the host, asked for; all else is there already."""

        def run(weights, cache, state, packed):
            assert isinstance(packed, np.ndarray)
            uploads.append(packed)
            return program(weights, cache, state, runner._put(packed))

        return run

    runner._forwards = {shape: upload_first(program) for shape, program in runner._forwards.items()}
    with jax.transfer_guard("disallow"):
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            jnp.add(jnp.zeros(3), np.ones(3)).block_until_ready()  # the guard is on
        recorder.loop.run()
    assert len(uploads) == sum(message.record is not None for message in recorder.messages)
    assert [output.finish_reason for output in recorder.ended] == ["length"] * REQUESTS
    gauges = recorder.messages[-1].gauges
    assert gauges.preemptions > 0 and gauges.restored_pages > 0


def test_only_read_waits_for_the_device_and_reads_one_array_a_step(recorder: Recorder, monkeypatch):
    reads: Counter[tuple[str, ...]] = Counter()
    array = type(jnp.zeros(1))
    value = array._value

    def count(read: jax.Array) -> None:
        callers, frame = [], sys._getframe(2)
        while frame is not None:
            callers.append(frame.f_code.co_name)
            frame = frame.f_back
        reads["read" if "read" in callers else callers[0], "saved" if "to_host" in callers else str(read.shape)] += 1

    def counted(self: jax.Array) -> np.ndarray:
        count(self)
        return value.fget(self)

    class CountingNumpy:
        """On a CPU numpy reads an array of JAX where it lies, and asks nobody."""

        def __getattr__(self, name: str):
            return getattr(np, name)

        def asarray(self, read: object, *arguments: object) -> np.ndarray:
            if isinstance(read, array):
                count(read)
            return np.asarray(read, *arguments)

    waits: list[str] = []
    monkeypatch.setattr(array, "_value", property(counted))
    monkeypatch.setattr(model_runner, "np", CountingNumpy())
    monkeypatch.setattr(array, "block_until_ready", lambda self: waits.append(repr(self.shape)))
    assert recorder.loop is not None
    recorder.loop.run()
    monkeypatch.undo()
    steps = sum(message.record is not None for message in recorder.messages)
    assert {caller for caller, _ in reads} == {"read"} and not waits
    of_tokens = {f"(2, {rows})" for rows in (1, 3, 6)}  # one of native products alone, small_slots, slots
    tokens = sum(count for (_, what), count in reads.items() if what in of_tokens)
    others = sum(count for (_, what), count in reads.items() if what not in {*of_tokens, "saved"})
    assert tokens == steps
    assert 0 < others < 2 * steps, "log-probabilities are read in the steps that have a row that asked"


def test_the_cache_and_the_state_stay_in_their_buffers(recorder: Recorder):
    assert recorder.loop is not None
    runner = recorder.loop._runner

    def addresses() -> list[int]:
        return [array.unsafe_buffer_pointer() for array in jax.tree.leaves(runner._cache)]

    before = addresses()
    recorder.loop.run()
    assert len(set(before)) == len(before) and addresses() == before


def test_pages_come_back_as_they_went(recorder: Recorder):
    assert recorder.loop is not None
    runner = recorder.loop._runner
    random = np.random.default_rng(0)
    cache = jax.tree.map(lambda array: jnp.asarray(random.normal(size=array.shape), array.dtype), runner._cache)
    original = jax.device_get(cache)
    pages = [5, 2, 17, 9, 1, 3, 4, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16]
    copies = PageCopies(cache, runner._placement.sharding())
    blocks = copies.to_host(copies.save(cache, pages), len(pages))
    targets = list(reversed(pages[3:]))
    restored = jax.device_get(copies.restore(cache, blocks, 3, targets))
    for arrays in zip(jax.tree.leaves(original), jax.tree.leaves(restored), strict=True):
        before, after = (np.moveaxis(array, cache.page_axis, 0) for array in arrays)
        untouched = [page for page in range(len(before)) if page not in targets]
        assert np.array_equal(after[targets], before[pages[3:]])
        assert np.array_equal(after[untouched], before[untouched])


def test_copies_of_pages_take_what_the_pages_take_on_the_host_and_a_bounded_part_of_the_device(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    assert recorder.loop is not None
    runner = recorder.loop._runner
    random = np.random.default_rng(1)
    cache = jax.tree.map(lambda array: jnp.asarray(random.normal(size=array.shape), array.dtype), runner._cache)
    original = jax.device_get(cache)
    monkeypatch.setattr(page_copies, "WAITING_BYTES", 2 * BLOCK * runner.allocation.page)
    copies = PageCopies(cache, runner._placement.sharding())
    pages = [*range(1, 17)] * 4 + [17]
    blocks = copies.save(cache, pages)
    on_device = [all(isinstance(array, jax.Array) for array in block) for block in blocks]
    assert on_device == [False] * 3 + [True] * 2
    saved = copies.to_host(blocks, len(pages))
    assert sum(array.nbytes for block in saved for array in block) == len(pages) * runner.allocation.page
    restored = jax.device_get(copies.restore(cache, saved, 0, pages))
    for arrays in zip(jax.tree.leaves(original), jax.tree.leaves(restored), strict=True):
        assert np.array_equal(*arrays)


def test_pages_of_many_sequences_on_their_way_to_the_device_are_bounded_together(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
):
    assert recorder.loop is not None
    runner = recorder.loop._runner
    cache = jax.tree.map(jnp.zeros_like, runner._cache)
    monkeypatch.setattr(page_copies, "WAITING_BYTES", 2 * BLOCK * runner.allocation.page)
    copies = PageCopies(cache, runner._placement.sharding())
    saved = copies.to_host(copies.save(cache, [1]), 1)
    waits = []
    monkeypatch.setattr(jax, "block_until_ready", waits.append)
    for _ in range(6):
        cache = copies.restore(cache, saved, 0, [2])
    assert len(waits) == 3


def test_replicas_share_the_host_memory_for_pages(recorder: Recorder):
    assert recorder.loop is not None
    runner = recorder.loop._runner
    alone = runner.host_pages
    runner.config = replace(runner.config, replicas=4)
    runner._take_pages(runner.allocation)
    assert runner.host_pages == alone // 4 > 0
