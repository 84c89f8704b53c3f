"""Distributions of lengths, in tokens, written as one word: 128, uniform:16-256, lognormal:128,0.6 (median, sigma)."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """A distribution."""

    least: int
    """No draw is less, and this is at least 1."""
    sample: Callable[[random.Random], float]

    def draw(self, random_: random.Random, longest: int) -> int:
        """One length, and where it is more than `longest` that."""
        return max(self.least, min(longest, round(self.sample(random_))))

    @staticmethod
    def parse(word: str) -> "Lengths":
        """Reads the word. Raises ValueError saying what is wrong."""
        kind, _, rest = word.partition(":")
        try:
            match kind:
                case "uniform":
                    low, high = map(int, rest.split("-"))
                    if low > high:
                        raise ValueError("the first is the less")
                    lengths = Lengths(low, lambda random_: random_.randint(low, high))
                case "lognormal":
                    median, sigma = map(float, rest.split(","))
                    mean = math.log(median)
                    lengths = Lengths(1, lambda random_: random_.lognormvariate(mean, sigma))
                case _:
                    fixed = int(word)
                    lengths = Lengths(fixed, lambda random_: fixed)
            if lengths.least < 1:
                raise ValueError("there is nothing of less than a token")
            return lengths
        except ValueError as error:
            raise ValueError(f"{word!r}: must be N, uniform:A-B or lognormal:MEDIAN,SIGMA") from error
