"""What one request or one step does wrong stays its own."""

import gc
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxserve.config import CoreKind, EngineConfig
from jaxserve.core.loop import MAX_RESTARTS, Publish
from jaxserve.core.messages import Progress, Ready
from jaxserve.device.kv_cache import KVCache
from jaxserve.engine import Engine, EngineStartError, ProgressCallback
from jaxserve.front.completion import collect
from jaxserve.front.statistics import Statistics
from jaxserve.request import Request, SamplingParams, StoppingParams
from jaxserve.request_errors import EngineUnavailable
from jaxserve.tokenizing.text_stream import TextStream
from jaxserve.tokenizing.token_bytes import TokenizerError

FAMILY = Path(__file__).parents[1] / "fixtures" / "families" / "llama2"
POISON = 77
"""A token whose embedding is made NaN."""


def requests(count: int, **fields: str) -> list[Request]:
    return [
        Request(
            token_ids=tuple(range(3, 3 + 5 * (index + 1))),
            sampling=SamplingParams(temperature=0.0),
            stopping=StoppingParams(max_tokens=20, min_tokens=20),
            **fields,
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """An engine of a tiny model in which one token makes the logits NaN."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(FAMILY, folder)
    tensors = dict(load_file(folder / "model.safetensors"))
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.embed_tokens.weight"][POISON] = np.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with Engine(model=str(folder), dtype="float32", slots=8, prefill_chunks=(32,), num_pages=64) as engine:
        yield engine


def test_a_row_that_is_not_finite_fails_alone_and_is_not_cached(tiny: Engine):
    alone = tiny.generate(requests(3))
    poisoned = Request(token_ids=(*range(3, 35), POISON), stopping=StoppingParams(max_tokens=5))
    first, bad, *rest = tiny.generate([requests(3)[0], poisoned, *requests(3)[1:]])
    assert (bad.finish_reason, bad.token_ids) == ("error", ())
    assert "not finite" in (bad.error or "")
    assert [c.token_ids for c in (first, *rest)] == [c.token_ids for c in alone]
    after = Request(token_ids=tuple(range(3, 40)), stopping=StoppingParams(max_tokens=1), cache_salt="")
    (clean,) = tiny.generate([after])
    assert (clean.finish_reason, clean.usage.cached_tokens) == ("length", 0)
    assert tiny.loads().available_pages == tiny.loads().total_pages


@pytest.mark.parametrize("where", ["forward", "choose", "read"])
def test_after_a_failed_step_streams_go_on_without_a_lost_or_repeated_token(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch, where: str
):
    """In a new cache, for which what the failed step left makes room: it may have filled the device's memory."""
    undisturbed = [c.token_ids for c in tiny.generate(requests(5, cache_salt="undisturbed"))]
    runner = tiny._core._loop._runner
    original, empty, calls = getattr(runner, where), KVCache.zeros, 0
    left: list[jax.Array] = []
    gone: list[bool] = []

    def fail_once(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 9:
            left.extend(jax.tree.leaves((runner._cache, runner._state)))
            raise RuntimeError("injected")
        return original(*arguments)

    def zeros(layout: KVCache) -> KVCache:
        gone.extend(array.is_deleted() for array in left)
        return empty(layout)

    monkeypatch.setattr(KVCache, "zeros", staticmethod(zeros))
    monkeypatch.setattr(runner, where, fail_once)
    disturbed = [c.token_ids for c in tiny.generate(requests(5, cache_salt=where))]
    assert calls > 9
    assert gone and all(gone)
    assert disturbed == undisturbed
    assert tiny.is_healthy
    assert tiny.loads().compiles_after_warmup == 0
    assert tiny.loads().available_pages == tiny.loads().total_pages


def test_steps_that_keep_failing_end_every_stream_and_the_engine_says_so():
    with Engine(simulated_step_ms=0.5, slots=4, max_context=256) as engine:
        runner = engine._core._loop._runner
        failures = 0
        all_submitted = threading.Event()

        def fail(_: object) -> None:
            nonlocal failures
            all_submitted.wait()
            failures += 1
            raise RuntimeError("injected")

        runner.forward = fail
        streams = [engine.submit(request) for request in requests(6)]
        all_submitted.set()
        completions = [collect(stream) for stream in streams]
        assert {completion.finish_reason for completion in completions} == {"error"}
        assert "injected" in (completions[0].error or "")
        assert failures == MAX_RESTARTS + 1
        assert not engine.is_healthy
        with pytest.raises(EngineUnavailable, match="injected"):
            engine.submit(requests(1)[0])


def test_a_program_whose_own_numbers_have_64_bits_gets_the_same_tokens():
    # A row that draws, with penalties and a bias, and one that is preempted: all of the programs of a step.
    drawn = {
        "temperature": 0.7,
        "seed": 3,
        "top_p": 0.9,
        "presence_penalty": 0.5,
        "logit_bias": {5: 1.0},
        "logprobs": 2,
    }
    prompts = [{"token_ids": [5, 6, 7], **drawn}, {"token_ids": list(range(3, 40)), "prompt_logprobs": 1}]

    def tokens() -> list[tuple[int, ...]]:
        shape = {"dtype": "float32", "slots": 4, "num_pages": 8, "prefill_chunks": (32,)}
        with Engine(model=str(FAMILY), **shape) as engine:
            completions = engine.generate([{"temperature": 0.0, **prompt} for prompt in prompts * 4], max_tokens=60)
            assert (engine.loads().preemptions > 0, engine.loads().compiles_after_warmup) == (True, 0)
            return [completion.token_ids for completion in completions]

    expected = tokens()
    jax.config.update("jax_enable_x64", True)  # not of this thread alone, as the context manager's
    try:
        assert tokens() == expected
    finally:
        jax.config.update("jax_enable_x64", False)


def test_a_killed_engine_process_ends_every_stream():
    engine = Engine(simulated_step_ms=5.0, slots=4, max_context=256, core="process")
    try:
        streams = [engine.submit(request) for request in requests(6)]
        next(streams[0])
        engine._core._process.kill()
        reasons = {collect(stream).finish_reason for stream in streams}
        assert reasons == {"error"}
        assert not engine.is_healthy
    finally:
        engine.shutdown()


@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_of_a_program_has_no_engine_and_its_parents_requests_go_on():
    with Engine(simulated_step_ms=5.0, slots=4, max_context=256, core="process") as engine:
        request = Request(token_ids=(1,), stopping=StoppingParams(max_tokens=100, ignore_eos=True))
        stream = engine.submit(request)
        next(stream)
        child = os.fork()
        if not child:
            signal.alarm(60)  # a lock that was held at the fork is never free here
            try:
                stream.cancel()
                engine.submit(replace(request, request_id="child"))
            except EngineUnavailable:
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        collected = [collect(stream), collect(engine.submit(replace(request, request_id="parent")))]
        assert [completion.finish_reason for completion in collected] == ["length"] * 2


def test_requests_for_which_a_core_has_no_room_reach_it_though_the_system_has_no_thread_left(
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Engine(simulated_step_ms=0.5, slots=4, max_context=2048, core="process") as engine:
        process = engine._core.pid
        request = Request(token_ids=tuple(range(1000, 3000)), stopping=StoppingParams(max_tokens=2, ignore_eos=True))
        with monkeypatch.context() as scarce:
            scarce.setattr(threading.Thread, "start", refuse)
            os.kill(process, signal.SIGSTOP)  # a core that reads nothing for a while
            try:
                streams = [engine.submit(replace(request, request_id=f"{number}")) for number in range(200)]
            finally:
                os.kill(process, signal.SIGCONT)
            assert [collect(stream).finish_reason for stream in streams] == ["length"] * 200


def test_an_engine_that_is_shut_down_leaves_no_process():
    family = Path(__file__).parents[1] / "fixtures" / "families" / "qwen3"
    with Engine(model=str(family), dtype="float32", slots=1, prefill_chunks=(16,)) as engine:
        chat = {"messages": [{"role": "user", "content": "a"}], "regex": "a", "max_tokens": 1}
        assert engine.generate([chat])[0].text == "a"
        checker = engine._admission.constraints
        assert engine.tokenizer._chat_template is not None and checker is not None
        processes = [engine.tokenizer._chat_template._renderer.process, checker._process.process]
        assert [process is not None and process.poll() for process in processes] == [None, None]
    assert [process is not None and process.poll() for process in processes] == [-signal.SIGKILL] * 2


def test_an_engine_that_is_shut_down_leaves_no_array_on_the_device():
    """At once, whoever still has the engine: the next one needs the room."""
    gc.collect()
    before = len(jax.live_arrays())
    try:
        with Engine(model=str(FAMILY), dtype="float32", slots=1, prefill_chunks=(16,)) as engine:
            engine.generate(requests(1))
            gc.collect()  # what libraries left in cycles while it was loaded
            gc.disable()
            assert len(jax.live_arrays()) > before
        assert len(jax.live_arrays()) == before
    finally:
        gc.enable()


def test_an_engine_whose_delivery_failed_shuts_down(monkeypatch: pytest.MonkeyPatch):
    def starved(*_: object) -> None:
        raise MemoryError("injected")

    engine = Engine(simulated_step_ms=0.5, slots=4, max_context=2048, publish_ahead=1)
    streams = [engine.submit(request) for request in requests(3)]
    monkeypatch.setattr(Statistics, "on_step", starved)
    assert {collect(stream).error for stream in streams} == {"delivery failed: MemoryError('injected')"}
    ending = threading.Thread(target=engine.shutdown, daemon=True)
    ending.start()
    ending.join(30)
    assert not ending.is_alive()


def test_a_request_that_cannot_be_delivered_ends_alone(monkeypatch: pytest.MonkeyPatch):
    with Engine(simulated_step_ms=0.5, slots=4, max_context=256) as engine:
        expected = [completion.token_ids for completion in engine.generate(requests(3))]
        push, left = TextStream.push, 5

        def starved(self: TextStream, token_ids: list[int]):
            nonlocal left
            left -= 1
            if left == 0:
                raise MemoryError("injected")
            return push(self, token_ids)

        monkeypatch.setattr(TextStream, "push", starved)
        completions = [collect(stream) for stream in [engine.submit(request) for request in requests(3)]]
        failed = [completion for completion in completions if completion.finish_reason == "error"]
        assert len(failed) == 1 and "injected" in (failed[0].error or "")
        for completion, tokens in zip(completions, expected, strict=True):
            assert completion.finish_reason == "error" or completion.token_ids == tokens
        assert [completion.token_ids for completion in engine.generate(requests(3))] == expected
        assert engine.is_healthy


def core_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jaxserve-core"]


def test_a_core_that_cannot_start_has_let_go_of_what_it_loaded_when_the_engine_says_so(monkeypatch: pytest.MonkeyPatch):
    awaited, await_ready = threading.Event(), Engine._await_ready
    freed = []

    class Weights:
        def __del__(self) -> None:
            time.sleep(0.2)  # large arrays take their time
            freed.append(threading.current_thread().name)

    def build(*_: object) -> None:
        weights = Weights()
        awaited.wait()
        raise ValueError(f"no attention for {type(weights).__name__}")

    def waiting(engine: Engine, progress: ProgressCallback) -> Ready:
        awaited.set()
        return await_ready(engine, progress)

    before = core_threads()
    monkeypatch.setattr("jaxserve.core.client.build_step_loop", build)
    monkeypatch.setattr(Engine, "_await_ready", waiting)
    with pytest.raises(EngineStartError, match="no attention"):
        Engine(simulated_step_ms=1.0)
    assert freed == ["jaxserve-core"]
    assert core_threads() == before


def test_a_core_stops_loading_where_the_engine_cannot_start_without_it(monkeypatch: pytest.MonkeyPatch):
    def load_for_ever(_: EngineConfig, publish: Publish, __: int) -> None:
        while True:
            publish(Progress("loading weights", None))

    def refuse(_: object) -> None:
        raise TokenizerError("no vocabulary")

    before = core_threads()
    monkeypatch.setattr("jaxserve.core.client.build_step_loop", load_for_ever)
    monkeypatch.setattr("jaxserve.engine.Tokenizer.from_source", refuse)
    with pytest.raises(EngineStartError, match="no vocabulary"):
        Engine(simulated_step_ms=1.0)
    assert core_threads() == before


def test_a_core_stops_loading_where_its_engine_is_interrupted(monkeypatch: pytest.MonkeyPatch):
    def load_for_ever(_: EngineConfig, publish: Publish, __: int) -> None:
        while True:
            publish(Progress("loading weights", None))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = core_threads()
    monkeypatch.setattr("jaxserve.core.client.build_step_loop", load_for_ever)
    registered: list[tuple[object, ...]] = []
    monkeypatch.setattr("atexit.register", lambda *call: registered.append(call))
    with pytest.raises(KeyboardInterrupt):
        Engine(simulated_step_ms=1.0, progress=interrupt)
    ((join, *arguments),) = registered
    assert callable(join)
    join(*arguments)
    for thread in core_threads():
        if thread not in before:
            thread.join(10.0)  # it has said its last
    assert core_threads() == before


@pytest.mark.parametrize("core", ["thread", "process"])
def test_what_is_wrong_with_model_or_configuration_has_the_errors_that_the_constructor_documents(core: CoreKind):
    with pytest.raises(EngineStartError, match="no-model is neither"):
        Engine(model="no-model", core=core)
    with pytest.raises(EngineStartError, match=r"x{5000}"):
        Engine(model="x" * 5000, core=core)
    with pytest.raises(ValueError, match="slots: must be at least 1, got 0"):
        Engine(slots=0, core=core)
