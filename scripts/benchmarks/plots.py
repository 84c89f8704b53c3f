"""Drawings of what benchmarks measure. matplotlib is an optional extra, imported only where something is drawn."""

import heapq
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.steps import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"device": "#2b6cb0", "host": "#dd6b20"}


def require_plots() -> None:
    """Ends the program with what to install, before anything is measured, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install 'jaxserve[plot]'")


def _axes(rows: int, title: str, height: float, width: float = 9.0, **options: Any) -> "list[Axes]":
    """Panels one below the other, `options` being those of pyplot.subplots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, 1, figsize=(width, height), layout="constrained", squeeze=False, **options)
    figure.suptitle(title)
    return list(axes[:, 0])


def _save(file: Path) -> None:
    """What was drawn last."""
    from matplotlib import pyplot

    file.parent.mkdir(parents=True, exist_ok=True)
    pyplot.savefig(file, dpi=120)
    pyplot.close("all")


def timeline(file: Path, modes: Mapping[str, Mapping[str, Sequence[Interval]]], title: str) -> None:
    """For each mode a panel with a lane for each of `modes[mode]`: bars of the intervals, in ms from the first."""
    panels = _axes(len(modes), title, 1.6 * len(modes) + 0.8)
    span = 0.0
    for axes, (mode, lanes) in zip(panels, modes.items(), strict=True):
        origin = min(start for intervals in lanes.values() for start, _ in intervals)
        for place, (lane, intervals) in enumerate(lanes.items()):
            bars = [(1e3 * (start - origin), 1e3 * (end - start)) for start, end in intervals]
            span = max(span, *(start + width for start, width in bars))
            # Neighbouring steps in two shades, so that they can be told apart where nothing lies between them.
            for shade, part in ((1.0, bars[::2]), (0.55, bars[1::2])):
                axes.broken_barh(part, (place - 0.35, 0.7), color=COLOURS.get(lane), alpha=shade)
        axes.set_yticks(range(len(lanes)), list(lanes))
        axes.set_title(mode, loc="left", fontsize="medium")
        axes.grid(axis="x", alpha=0.3)
    for axes in panels:
        axes.set_xlim(0, span)
    panels[-1].set_xlabel("ms")
    _save(file)


def lines(file: Path, series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> None:
    """A line for each series of (x, y), on a logarithmic x axis ticked at the points."""
    (axes,) = _axes(1, f"{y} over {x}", 4.0)
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    places = sorted({place for points in series.values() for place, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(file)


def distributions(file: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> None:
    """For each panel (what is on its x axis) the cumulative distribution of each series of values, up to its p99.9."""
    all_axes = _axes(len(panels), title, 2.6 * len(panels) + 0.6)
    for axes, (label, series) in zip(all_axes, panels.items(), strict=True):
        for name, values in series.items():
            ordered = sorted(values)
            shares = [(index + 1) / len(ordered) for index in range(len(ordered))]
            axes.step(ordered, shares, where="post", label=name)
        ends = [sorted(values)[int(0.999 * (len(values) - 1))] for values in series.values()]
        axes.set_xlim(0, 1.05 * max(ends))
        axes.set_ylim(0, 1)
        axes.set_xlabel(label)
        axes.set_ylabel("share of all")
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    _save(file)


def samples_over_time(
    file: Path, panels: Mapping[str, Sequence[tuple[float, float]]], counted_from: float, title: str
) -> None:
    """A panel for each series of (monotonic second, value); grey until what counts begins."""
    all_axes = _axes(len(panels), title, 2.6 * len(panels) + 0.6)
    for axes, (label, points) in zip(all_axes, panels.items(), strict=True):
        origin = points[0][0]
        axes.axvspan(0, (counted_from - origin) / 60, color=WAITING, alpha=0.5, label="warm-up")
        axes.plot([(at - origin) / 60 for at, _ in points], [value for _, value in points], color=COLOURS["device"])
        axes.set_ylabel(label)
        axes.set_xlim(0, (points[-1][0] - origin) / 60)
        axes.grid(alpha=0.3)
    all_axes[0].legend(loc="lower right")
    all_axes[-1].set_xlabel("minutes")
    _save(file)


@dataclass(frozen=True)
class Bar:
    """One stream over time, in monotonic seconds."""

    sent: float
    first: float
    """First token; the end where none came."""
    ended: float
    ending: str
    """A key of ENDINGS."""


ENDINGS = {
    "completed": "#2b6cb0",
    "cancelled": "#dd6b20",
    "deadline": "#805ad5",
    "refused": "#c53030",
    "failed": "#1a202c",
}
WAITING = "#cbd5e0"
"""Colour of the time before the first token."""


def streams_over_time(
    file: Path, bars: Sequence[Bar], gauges: Mapping[str, Sequence[tuple[float, float]]], title: str
) -> None:
    """Streams as bars in as few lanes as they need: grey until the first token, then in the colour of how they ended.
    Below, the server's own gauges at the same times."""
    origin = min(bar.sent for bar in bars)
    lanes = _in_lanes(bars)
    count = max(lanes) + 1
    height = min(7.0, max(1.8, 0.16 * count))
    ratios = [height, 1.6] if gauges else [height]
    axes = _axes(
        len(ratios), f"Streams over time, {title}", sum(ratios) + 1.2, width=10, sharex=True, height_ratios=ratios
    )
    top = axes[0]
    for ending, colour in ENDINGS.items():
        chosen = [(bar, lane) for bar, lane in zip(bars, lanes, strict=True) if bar.ending == ending]
        if not chosen:
            continue
        places = [lane for _, lane in chosen]
        starts = [bar.first - origin for bar, _ in chosen]
        widths = [bar.ended - bar.first for bar, _ in chosen]
        top.barh(places, widths, left=starts, height=0.8, color=colour, label=f"{ending} ({len(chosen)})")
        before = [bar.first - bar.sent for bar, _ in chosen]
        top.barh(places, before, left=[bar.sent - origin for bar, _ in chosen], height=0.8, color=WAITING)
        # An end without a token has no width: a mark shows it.
        short = [(bar.ended - origin, lane) for bar, lane in chosen if bar.ended - bar.first < 1e-3]
        if short:
            top.plot(*zip(*short, strict=True), linestyle="", marker="|", markersize=5, color=colour)
    top.barh([0], [0], color=WAITING, label="before the first token")
    top.set_ylabel("streams open at once")
    top.set_ylim(-0.6, count - 0.4)
    top.grid(axis="x", alpha=0.3)
    top.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    if gauges:
        below = axes[1]
        for (name, points), colour in zip(gauges.items(), ("#2b6cb0", "#dd6b20"), strict=False):
            below.step(
                [at - origin for at, _ in points],
                [value for _, value in points],
                where="post",
                label=name,
                color=colour,
            )
        below.set_ylim(bottom=0)
        below.set_ylabel("requests")
        below.grid(alpha=0.3)
        below.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False, title="server says")
    axes[-1].set_xlim(0, max(bar.ended for bar in bars) - origin)
    axes[-1].set_xlabel("seconds")
    _save(file)


def _in_lanes(bars: Sequence[Bar]) -> list[int]:
    """A lane for each bar: the lowest that is free when it begins."""
    free: list[int] = []
    busy: list[tuple[float, int]] = []
    lanes = [0] * len(bars)
    for index in sorted(range(len(bars)), key=lambda index: bars[index].sent):
        while busy and busy[0][0] <= bars[index].sent:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lanes[index] = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (bars[index].ended, lanes[index]))
    return lanes
