"""The built-in page and its feed."""

import asyncio
import json
import re
from dataclasses import replace

import pytest
from http_serving import exchange, http_serving
from scripted_engine import ScriptedEngine

from jaxserve.core.messages import StepRecord
from rpc.http.live import DECODE, EMPTY, MAX_STEPS, MAX_VIEWERS, PROMPT, Lanes


def step(number: int, slots: list[int], **changes: list[int]) -> StepRecord:
    given = {"given_slots": [], "taken_slots": [], "freed_slots": [], "prompt_slots": [], **changes}
    return StepRecord(number, len(slots), 0, number - 0.5, float(number), 0.0, 0.0, slots=slots, **given)


def test_lanes_follow_prompts_tokens_ends_and_next_owners() -> None:
    lanes = Lanes(3)
    records = [
        step(1, [0], taken_slots=[0], prompt_slots=[0]),
        step(2, [0, 1], taken_slots=[1], prompt_slots=[1]),
        step(3, [0, 1], freed_slots=[0]),
        step(4, [0, 1], taken_slots=[0], prompt_slots=[0]),
    ]
    assert lanes.follow(records, epoch=0.0) == [
        (0, PROMPT, 1, 0.5),
        (0, DECODE, 1, 1.5),
        (1, PROMPT, 2, 1.5),
        (1, DECODE, 2, 2.5),
        (0, EMPTY, 1, 3.0),
        (0, PROMPT, 3, 3.5),
    ]
    # An aborted sequence has no last token: it is missing from the next step.
    assert lanes.follow([step(5, [0])], epoch=0.0) == [(0, DECODE, 3, 4.5), (1, EMPTY, 2, 4.5)]
    assert lanes.clear(9.0) == [(0, EMPTY, 3, 9.0)]


def test_a_replica_s_step_says_nothing_of_another_s_slots() -> None:
    lanes = Lanes(2, replicas=2)
    lanes.follow([step(7, [0], taken_slots=[0]), replace(step(1, [2, 3], taken_slots=[2, 3]), replica=1)], epoch=0.0)
    assert lanes.kinds == [DECODE, EMPTY, DECODE, DECODE]
    assert lanes.follow([replace(step(2, [3]), replica=1)], epoch=0.0) == [(2, EMPTY, 2, 1.5)]


class Viewer:
    """One connection to the feed."""

    def __init__(self, address: str):
        self._address = address

    async def __aenter__(self) -> "Viewer":
        host, port = self._address.split(":")
        self._reader, self._writer = await asyncio.open_connection(host, int(port))
        self._writer.write(b"GET /live HTTP/1.1\r\nhost: test\r\n\r\n")
        self.head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()

    async def frame(self) -> dict:
        while True:
            line = await self._reader.readline()
            assert line, "the feed ended"
            if line.startswith(b"data: "):
                return json.loads(line[6:])


@pytest.mark.asyncio
async def test_the_feed_begins_with_the_whole_picture_and_goes_on_with_what_changed() -> None:
    engine = ScriptedEngine(slots=4)
    async with http_serving(engine) as (_, address), Viewer(address) as viewer:
        picture = await viewer.frame()
        assert (picture["model"], picture["state"], picture["lanes"]) == ("scripted", "ready", [[0, 0]] * 4)
        engine.step_records += [step(1, [2], taken_slots=[2], prompt_slots=[2]), step(2, [2])]
        engine.paused.set()
        frame = await viewer.frame()
        while not frame["changes"]:
            frame = await viewer.frame()
        assert [change[:3] for change in frame["changes"]] == [[2, PROMPT, 1], [2, DECODE, 1], [2, EMPTY, 1]]
        assert frame["pages"] == [0, 0, engine.total_pages]
        assert (await viewer.frame())["changes"] == []


@pytest.mark.asyncio
@pytest.mark.parametrize("replicas", [1, 4])
async def test_a_page_that_is_opened_begins_with_each_replica_s_latest_steps_and_not_with_all_that_are_known(
    replicas: int,
) -> None:
    engine = ScriptedEngine()
    engine.config = replace(engine.config, replicas=replicas)
    engine.step_records = [
        replace(step(number, [8 * replica + number % 8]), replica=replica)
        for number in range(4096 // replicas)
        for replica in range(replicas)
    ]
    async with http_serving(engine) as (_, address), Viewer(address) as viewer:
        await viewer.frame()
        changes = (await viewer.frame())["changes"]
    assert isinstance(changes, list)
    # Each step has one slot more and one less than the step before; the last one's is cleared, for nothing runs.
    assert len(changes) == 2 * MAX_STEPS * replicas


@pytest.mark.asyncio
async def test_viewers_are_bounded_and_one_that_leaves_makes_room() -> None:
    async with http_serving(ScriptedEngine()) as (_, address):
        viewers = [Viewer(address) for _ in range(MAX_VIEWERS)]
        for viewer in viewers:
            await viewer.__aenter__()
            assert " 200 " in viewer.head
        refused = b"GET /live HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"
        assert (await exchange(address, refused)).status == 429
        await viewers[0].__aexit__()

        async def admitted() -> bool:
            async with Viewer(address) as again:
                return " 200 " in again.head

        while not await admitted():
            await asyncio.sleep(0.05)
        for viewer in viewers[1:]:
            await viewer.__aexit__()


@pytest.mark.asyncio
async def test_the_head_of_the_feed_ends_at_once_and_makes_no_viewer() -> None:
    head = b"HEAD /live HTTP/1.1\r\nhost: test\r\n\r\n"
    last = b"GET /health HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n"
    async with http_serving(ScriptedEngine()) as (_, address):
        answer = await exchange(address, head * (MAX_VIEWERS + 1) + last)
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    answers = answer.body.split(b"\r\n\r\n")
    assert [one.startswith(b"HTTP/1.1 200 OK") for one in answers] == [True] * (MAX_VIEWERS + 1) + [False]
    assert json.loads(answers[-1]) == {"status": "ready"}


@pytest.mark.asyncio
async def test_the_page_is_one_file_that_fetches_nothing_from_elsewhere() -> None:
    async with http_serving(ScriptedEngine()) as (_, address):
        answer = await exchange(address, b"GET / HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
    page = answer.body.decode()
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page


@pytest.mark.asyncio
async def test_a_viewer_does_not_hold_a_stop() -> None:
    async with http_serving(ScriptedEngine()) as (server, address), Viewer(address) as viewer:
        await viewer.frame()
        await server.stop(grace=0.0)
        with pytest.raises((AssertionError, ConnectionError)):
            while True:
                await viewer.frame()
