"""What a load test sends: when, how long, and which of the requests do not behave.

A load is written as one word:

    closed:32            so many streams are open; where one ends the next begins
    poisson:4            requests a second, at random times
    burst:50/10          so many at once, every so many seconds
    ramp:1-20            requests a second, growing evenly over the duration
    trace:FILE           at the times and with the lengths of a file
"""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.load.lengths import Lengths
from benchmarks.load.trace import read_trace

Behaviour = Literal["complete", "cancel", "deadline", "slow"]


@dataclass(frozen=True)
class Planned:
    """One request."""

    index: int
    at: float | None
    """Seconds after the start; None in a closed loop."""
    prompt_tokens: int
    output_tokens: int
    behaviour: Behaviour = "complete"
    amount: float = 0.0
    """Of `cancel` the tokens after which the client leaves, of `deadline` seconds, of `slow` seconds a message."""


@dataclass(frozen=True)
class Mix:
    """Shares of requests, 0 to 1, that do not behave; the rest runs to its end."""

    cancel: float = 0.0
    deadline: float = 0.0
    slow: float = 0.0
    deadline_seconds: float = 0.5
    slow_seconds: float = 0.2

    def __post_init__(self) -> None:
        """Raises ValueError where the shares are more than all."""
        shares = (self.cancel, self.deadline, self.slow)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"shares of cancellations, deadlines and slow readers must sum to at most 1, got {shares}")

    def draw(self, random_: random.Random, output_tokens: int) -> tuple[Behaviour, float]:
        """How one request behaves."""
        place = random_.random()
        if place < self.cancel:
            return "cancel", float(random_.randint(0, max(0, output_tokens - 1)))
        if place < self.cancel + self.deadline:
            return "deadline", self.deadline_seconds
        if place < self.cancel + self.deadline + self.slow:
            return "slow", self.slow_seconds
        return "complete", 0.0


@dataclass(frozen=True)
class Load:
    """A kind of load and its figures, as the word for it says."""

    word: str
    kind: str
    amount: float
    """Streams of `closed`, requests a second of `poisson`, requests of a `burst`, the last rate of a `ramp`."""
    other: float = 0.0
    """Seconds between bursts, the first rate of a ramp."""
    file: str = ""

    @staticmethod
    def parse(word: str) -> "Load":
        """Reads the word. Raises ValueError saying what is wrong."""
        kind, _, rest = word.partition(":")
        try:
            match kind:
                case "closed":
                    load = Load(word, kind, int(rest))
                case "poisson":
                    load = Load(word, kind, float(rest))
                case "burst":
                    size, _, every = rest.partition("/")
                    load = Load(word, kind, int(size), float(every or 10))
                case "ramp":
                    first, _, last = rest.partition("-")
                    load = Load(word, kind, float(last), float(first))
                case "trace":
                    if not rest:
                        raise ValueError("no file")
                    return Load(word, kind, 1.0, file=rest)
                case _:
                    raise ValueError("no such kind")
        except ValueError as error:
            forms = "closed:N, poisson:RATE, burst:N/SECONDS, ramp:A-B or trace:FILE"
            raise ValueError(f"{word!r}: must be {forms}") from error
        is_finite = 0 < load.amount < math.inf and 0 <= load.other < math.inf
        if not is_finite or (kind == "burst" and load.other == 0):
            raise ValueError(f"{word!r}: must be positive")
        return load

    def times(self, duration: float, requests: int | None, seed: int) -> Iterator[float | None]:
        """When requests are sent, in seconds after the start."""
        random_ = random.Random(seed)
        match self.kind:
            case "closed":
                # Without a number of requests the clients stop by the clock.
                yield from itertools.repeat(None, requests or 1_000_000)
                return
            case "poisson":
                places = _ramp(self.amount, self.amount, duration, random_)
            case "burst":
                places = (turn * self.other for turn in itertools.count() for _ in range(round(self.amount)))
            case "ramp":
                places = _ramp(self.other, self.amount, duration, random_)
            case _:
                raise AssertionError(self.kind)
        for number, place in enumerate(places):
            if place >= duration or (requests is not None and number >= requests):
                return
            yield place


def _ramp(first: float, last: float, duration: float, random_: random.Random) -> Iterator[float]:
    """A Poisson process whose rate grows evenly, by thinning one of the highest rate."""
    highest, place = max(first, last), 0.0
    while True:
        place += random_.expovariate(highest)
        if random_.random() * highest <= first + (last - first) * min(1.0, place / duration):
            yield place


def make_plan(
    load: Load,
    duration: float,
    requests: int | None,
    prompts: Lengths,
    outputs: Lengths,
    longest: int,
    mix: Mix,
    seed: int,
) -> Iterator[Planned]:
    """The requests of a load. Of one that is longer than `longest` tokens the prompt is cut until the shortest output
    has room, and then the output. The same seed gives the same plan. Raises ValueError where no request has room, and
    TraceError."""
    random_ = random.Random(seed)
    if load.kind == "trace":
        entries = read_trace(Path(load.file))[:requests]
        for index, (at, prompt, output) in enumerate(entries):
            prompt = min(prompt, longest - 1)
            output = min(output, longest - prompt)
            yield Planned(index, at, prompt, output, *mix.draw(random_, output))
        return
    if prompts.least + outputs.least > longest:
        raise ValueError(f"a prompt of {prompts.least} and an output of {outputs.least} tokens are over {longest}")
    for index, at in enumerate(load.times(duration, requests, seed)):
        prompt = prompts.draw(random_, longest - outputs.least)
        output = outputs.draw(random_, longest - prompt)
        yield Planned(index, at, prompt, output, *mix.draw(random_, output))
