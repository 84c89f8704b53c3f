"""Few cases in place of all: each pair of values of two factors comes together in one case at least."""

import itertools
import random
from collections.abc import Hashable, Mapping, Sequence


def covering(factors: Mapping[str, Sequence[Hashable]], seed: int = 0) -> list[dict[str, Hashable]]:
    """Cases over the factors that hold every pair of their values; the same for the same seed.

    Takes one case after another: the best of some random ones that hold a pair not seen yet.
    """
    names = list(factors)
    draws = random.Random(seed)
    wanted = {
        ((one, a), (two, b))
        for one, two in itertools.combinations(names, 2)
        for a in factors[one]
        for b in factors[two]
    }
    cases = []
    while wanted:
        fixed = dict(min(wanted, key=str))
        candidates = [{name: draws.choice(factors[name]) for name in names} | fixed for _ in range(50)]
        best = max(candidates, key=lambda case: len(wanted & _pairs(case)))
        wanted -= _pairs(best)
        cases.append({name: best[name] for name in names})
    return cases


def each_value(factors: Mapping[str, Sequence[Hashable]]) -> list[dict[str, Hashable]]:
    """As many cases as the longest factor has values; each value of each factor is in one at least."""
    count = max(map(len, factors.values()))
    return [{name: values[case % len(values)] for name, values in factors.items()} for case in range(count)]


def every(factors: Mapping[str, Sequence[Hashable]]) -> list[dict[str, Hashable]]:
    """All combinations."""
    return [dict(zip(factors, values, strict=True)) for values in itertools.product(*factors.values())]


def _pairs(case: Mapping[str, Hashable]) -> set[tuple[tuple[str, Hashable], ...]]:
    return set(itertools.combinations(case.items(), 2))
