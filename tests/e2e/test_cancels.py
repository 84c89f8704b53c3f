"""1,000 seeded cancels, wherever a request is: queued, in its prompt, decoding, preempted, at its last step."""

import random
from collections import Counter

from jaxserve.engine import Engine
from jaxserve.events import Delta, Finished, FinishReason, Started
from jaxserve.front.request_stream import RequestStream
from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams

CANCELS = 1000


def simulated_ids(prompt_tokens: int, count: int) -> list[int]:
    """What the simulated device generates: it depends on the position alone."""
    return [260 + (position * 7919) % 1000 for position in range(prompt_tokens, prompt_tokens + count)]


def test_each_sequence_ends_once_and_all_pages_return():
    random_ = random.Random(11)
    reasons: Counter[FinishReason] = Counter()
    unstarted = at_the_end = 0
    with Engine(simulated_step_ms=0.2, slots=6, num_pages=60, page_size=4, max_context=128, max_waiting=200) as engine:
        waiting: list[tuple[RequestStream, int, int, int]] = []

        def end_oldest() -> None:
            """Cancels a request once so many of its events have been read."""
            nonlocal unstarted, at_the_end
            stream, sequences, after, prompt = waiting.pop(0)
            events = []
            for event in stream:
                events.append(event)
                if len(events) == after:
                    stream.cancel()
                    stream.cancel()
            ended = [event for event in events if isinstance(event, Finished)]
            assert sorted(event.index for event in ended) == list(range(sequences))
            for end in ended:
                ids = [
                    id
                    for event in events
                    if isinstance(event, Delta) and event.index == end.index
                    for id in event.token_ids
                ]
                assert ids == simulated_ids(prompt, len(ids)) and len(ids) == end.usage.completion_tokens
            reasons.update(event.finish_reason for event in ended)
            unstarted += not any(isinstance(event, Started) for event in events)
            at_the_end += all(event.finish_reason is FinishReason.LENGTH for event in ended)

        cancels, number = 0, 0
        while cancels < CANCELS:
            number += 1
            tokens = random_.choice((1, 2, 8, 40))
            sequences = random_.choice((1, 1, 1, 3))
            prompt_tokens = random_.choice((3, 30, 80))
            request = Request(
                token_ids=tuple(range(300, 300 + prompt_tokens)),
                sampling=SamplingParams(n=sequences, seed=number),
                stopping=StoppingParams(max_tokens=tokens, ignore_eos=True),
                output=OutputParams(return_text=False),
                priority=random_.randint(0, 2),
            )
            stream = engine.submit(request)
            waiting.append((stream, sequences, random_.randint(1, tokens + 1), prompt_tokens))
            if random_.random() < 0.9:
                random_.choice(waiting)[0].cancel()
                cancels += 1
            while len(waiting) > random_.randint(1, 30):
                end_oldest()
        while waiting:
            end_oldest()
        preemptions = engine.loads().preemptions
        for _ in range(2000):
            if engine.loads().available_pages == engine.loads().total_pages:
                break
            list(engine.submit(Request(token_ids=(300,), stopping=StoppingParams(max_tokens=1))))
        loads = engine.loads()
        assert (loads.running, loads.waiting, loads.available_pages) == (0, 0, loads.total_pages)
    print(
        f"{dict(reasons)}, {unstarted} before their prompt was computed, {at_the_end} too late, {preemptions} preempted"
    )
    assert set(reasons) == {FinishReason.ABORT, FinishReason.LENGTH}
    assert unstarted > 50 and at_the_end > 50 and preemptions > 0
