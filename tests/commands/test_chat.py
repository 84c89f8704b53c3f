"""Conversations: turns are remembered, answers stream, SIGINT ends one."""

import io
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from jaxserve.commands.chat import Conversation
from jaxserve.commands.start import CommandError
from jaxserve.engine import Engine
from jaxserve.request import SamplingParams, StoppingParams

TOKENS = StoppingParams(max_tokens=8)


def conversation(
    engine: Engine, stopping: StoppingParams = TOKENS, interactive: bool = False, temperature: float = 0.0
) -> Conversation:
    sampling = SamplingParams(temperature=temperature)
    return Conversation(engine, sampling, stopping, interactive, io.StringIO(), io.StringIO())


def expected(engine: Engine, *turns: str) -> str:
    """The answer to the last of the turns, which are the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": text} for index, text in enumerate(turns)]
    (completion,) = engine.generate([{"messages": messages}], temperature=0.0, max_tokens=8)
    return completion.text


def test_an_answer_knows_the_turns_before_it_until_clear(engine: Engine):
    chat = conversation(engine)
    assert chat.run(iter(["My name is Ada.\n", "\n", "Who am I?\n", "/clear\n", "Who am I?\n"])) == 0
    first = expected(engine, "My name is Ada.")
    second = expected(engine, "My name is Ada.", first, "Who am I?")
    third = expected(engine, "Who am I?")
    assert chat.output.getvalue() == f"{first}\n{second}\n{third}\n"


def test_instructions_precede_the_conversation(engine: Engine):
    chat = conversation(engine)
    chat.system = "Answer in French."
    chat.run(iter(["Hello"]))
    assert chat.output.getvalue().rstrip("\n") != expected(engine, "Hello")


def test_a_turn_that_does_not_fit_is_forgotten_and_the_next_is_answered(engine: Engine):
    chat = conversation(engine)
    assert chat.run(iter(["word " * 3000, "Hi"])) == 1
    assert "messages" in chat.errors.getvalue() and "2047" in chat.errors.getvalue()
    assert chat.output.getvalue() == expected(engine, "Hi") + "\n"


def test_an_answer_is_as_long_as_there_is_room_for_until_clear_makes_more():
    with Engine(simulated_step_ms=0.1, slots=2, max_context=128) as engine:
        chat = conversation(engine, StoppingParams(max_tokens=60, ignore_eos=True))
        assert chat.run(iter(["A story.", "Another."])) == 0
        answers = [len(engine.tokenizer.encode(turn["content"])) for turn in chat.turns[1::2]]
        assert answers[0] > 40 and 0 < answers[1] < 40
        assert chat.run(iter(["One more.", "/clear", "A story."])) == 1
        assert len(chat.turns) == 2
        assert "the limit is 127. /clear starts over.\n" in chat.errors.getvalue()


def test_a_turn_that_leaves_no_room_for_the_least_answer_is_forgotten():
    with Engine(simulated_step_ms=0.1, slots=2, max_context=128) as engine:
        chat = conversation(engine, StoppingParams(max_tokens=120, min_tokens=120))
        assert chat.run(iter(["A story."])) == 1
        assert "min_tokens: must be in [0, " in chat.errors.getvalue()
        assert chat.errors.getvalue().endswith("/clear starts over.\n")


@pytest.mark.parametrize(
    ("stopping", "temperature", "says"),
    [
        (TOKENS, -1.0, "temperature: must be in"),
        (StoppingParams(max_tokens=2048), 0.0, "max_tokens: must be at most 2047 in a context of 2048, got 2048"),
        (StoppingParams(min_tokens=2048), 0.0, "min_tokens: must be at most 2047"),
    ],
)
def test_an_option_out_of_range_ends_the_command(
    engine: Engine, stopping: StoppingParams, temperature: float, says: str
):
    with pytest.raises(CommandError, match=says):
        conversation(engine, stopping, temperature=temperature).run(iter(["Hi"]))


@pytest.mark.parametrize("interactive", [True, False])
def test_an_interrupt_ends_the_answer_and_without_a_person_the_command(engine: Engine, interactive: bool):
    chat = conversation(engine, StoppingParams(max_tokens=1500, ignore_eos=True), interactive)
    asked = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are given none

    def interrupt() -> None:
        while engine.loads().running == 0:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    def lines() -> Iterator[str]:
        threading.Thread(target=interrupt, daemon=True).start()
        yield "Tell a long story."
        asked.append("again")  # the person is asked for the next turn

    try:
        assert chat.run(lines()) == (0 if interactive else 130)
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == (["again"] if interactive else [])
    assert len(chat.output.getvalue()) < 1500, "1,500 tokens have more characters"
    for _ in range(2000):  # the steps in flight fence some pages
        loads = engine.loads()
        if (loads.running, loads.available_pages) == (0, loads.total_pages):
            return
        time.sleep(0.005)
    raise AssertionError(loads)
