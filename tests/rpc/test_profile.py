"""A trace of a live server, asked for as an operator does."""

import asyncio
import shutil
import threading
from pathlib import Path

import pytest
from serving import back_to_the_start, lent, serving

from jaxserve.cli import main
from jaxserve.engine import Engine
from jaxserve.request_errors import EngineUnavailable, InvalidRequest

pytestmark = pytest.mark.asyncio


async def test_a_trace_is_taken_while_requests_go_on_and_the_command_says_where_it_lies(
    engine: Engine, capsys: pytest.CaptureFixture[str], logging_unchanged: None
) -> None:
    async with serving(lent(engine)) as (server, client):
        fields = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
        alone = await client.generate_once("The harbour", **fields)
        command = ["profile", "--address", client.address, "--seconds", "0.5"]
        running = asyncio.create_task(asyncio.to_thread(main, command))
        while not engine._profiling.locked() and not running.done():
            await asyncio.sleep(0.005)
        with pytest.raises(EngineUnavailable, match="already"):
            await client.profile(0.5)
        during = await client.generate_once("The harbour", **fields)
        assert await running == 0
        assert during.token_ids == alone.token_ids
        with pytest.raises(InvalidRequest, match=r"must be in \(0, 60\]"):
            await client.profile(61.0)
        await back_to_the_start(engine, server)
    folder = Path(capsys.readouterr().out.strip())
    assert list(folder.rglob("*.xplane.pb"))
    shutil.rmtree(folder)


async def test_an_address_without_a_server_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], logging_unchanged: None
) -> None:
    assert await asyncio.to_thread(main, ["profile", "--address", "127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.startswith("jaxserve: error: 127.0.0.1:1: ")


async def test_an_engine_that_has_stopped_refuses_every_trace() -> None:
    with Engine(simulated_step_ms=1.0, slots=4, max_context=256) as engine:
        pass
    refusals: list[EngineUnavailable] = []

    def profile() -> None:
        try:
            engine.profile(0.1)
        except EngineUnavailable as refusal:
            refusals.append(refusal)

    for _ in range(3):
        asking = threading.Thread(target=profile, daemon=True)
        asking.start()
        asking.join(60)
    assert ["has stopped" in str(refusal) for refusal in refusals] == [True] * 3


async def test_a_trace_for_which_there_is_no_thread_or_no_folder_is_refused_and_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    with Engine(simulated_step_ms=1.0, slots=4, max_context=256) as engine:
        for place, error in {
            "threading.Thread.start": RuntimeError("can't start new thread"),
            "tempfile.mkdtemp": FileNotFoundError("No usable temporary directory found"),
        }.items():
            with monkeypatch.context() as scarce:
                scarce.setattr(place, refuse)
                with pytest.raises(EngineUnavailable, match=str(error)):
                    engine.profile(0.1)
            assert engine.generate(["a"], max_tokens=2)[0].finish_reason == "length"
