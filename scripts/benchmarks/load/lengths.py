"""Distributions of lengths, in tokens, written as one word: 128, uniform:16-256, lognormal:128,0.6 (median, sigma)."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """A distribution, cut off at both ends."""

    word: str
    sample: Callable[[random.Random], float]
    longest: int
    """Tokens; a draw is at least 1 and at most this."""

    def draw(self, random_: random.Random) -> int:
        """One length."""
        return max(1, min(self.longest, round(self.sample(random_))))

    @staticmethod
    def parse(word: str, longest: int) -> "Lengths":
        """Reads the word. Raises ValueError saying what is wrong."""
        kind, _, rest = word.partition(":")
        try:
            match kind:
                case "uniform":
                    low, high = map(int, rest.split("-"))
                    return Lengths(word, lambda random_: random_.randint(low, high), longest)
                case "lognormal":
                    median, sigma = map(float, rest.split(","))
                    mean = math.log(median)
                    return Lengths(word, lambda random_: random_.lognormvariate(mean, sigma), longest)
                case _:
                    fixed = int(word)
                    return Lengths(word, lambda random_: fixed, longest)
        except ValueError as error:
            raise ValueError(f"{word!r}: must be N, uniform:A-B or lognormal:MEDIAN,SIGMA") from error
