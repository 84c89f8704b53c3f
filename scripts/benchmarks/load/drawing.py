"""Drawings of a load test: distributions of latencies, throughput over load, and streams over time."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.load.clients import Run
from benchmarks.load.gauges import Sample
from benchmarks.load.outcome import Outcome
from benchmarks.load.plan import Load
from benchmarks.plots import Bar, distributions, lines, streams_over_time

Drawn = Sequence[tuple[Load, Run, list[Sample]]]


def draw(folder: Path, results: Drawn) -> None:
    """Draws everything that the results give."""
    whole = {
        load.word: [one for one in run.outcomes if one.ending == "completed" and one.planned == "complete"]
        for load, run, _ in results
    }
    whole = {word: outcomes for word, outcomes in whole.items() if any(one.arrivals for one in outcomes)}
    if whole:
        panels = {
            "time to first token, ms": _values(whole, lambda one: [1e3 * one.first_token]),
            "between messages, ms": _values(whole, lambda one: [1e3 * gap for gap in one.gaps]),
            "whole request, ms": _values(whole, lambda one: [1e3 * one.total]),
        }
        distributions(folder / "latency.png", {k: v for k, v in panels.items() if v}, "Latency as clients see it")
    for kind, unit in (("closed", "open streams"), ("poisson", "requests a second")):
        chosen = [(load, run) for load, run, _ in results if load.kind == kind and run.outcomes]
        if len(chosen) > 1:
            _draw_throughput(folder / f"throughput_{kind}.png", chosen, unit)
    for number, (load, run, samples) in enumerate(results):
        if run.outcomes:
            name = f"streams_{number}_{load.kind}.png"
            streams_over_time(folder / name, [_bar(one) for one in run.outcomes], _gauge_lines(samples), load.word)


def _values(
    outcomes: Mapping[str, Sequence[Outcome]], values: Callable[[Outcome], list[float]]
) -> dict[str, list[float]]:
    found = {word: [value for one in all_ if one.arrivals for value in values(one)] for word, all_ in outcomes.items()}
    return {word: numbers for word, numbers in found.items() if numbers}


def _draw_throughput(file: Path, chosen: Sequence[tuple[Load, Run]], unit: str) -> None:
    points = []
    for load, run in chosen:
        seconds = max(one.ended for one in run.outcomes) - min(one.sent for one in run.outcomes)
        points.append((load.amount, sum(one.tokens for one in run.outcomes) / seconds))
    lines(file, {"served": sorted(points)}, unit, "output tokens/s")


def _bar(outcome: Outcome) -> Bar:
    first = outcome.arrivals[0] if outcome.arrivals else outcome.ended
    return Bar(outcome.sent, first, outcome.ended, outcome.ending)


def _gauge_lines(samples: Sequence[Sample]) -> dict[str, list[tuple[float, float]]]:
    if not samples:
        return {}
    return {
        "running": [(sample.at, sample.running) for sample in samples],
        "waiting": [(sample.at, sample.waiting) for sample in samples],
    }
