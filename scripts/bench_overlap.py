"""Whether the device waits for the host, and whether one request's tokens wait for another's.

    python scripts/bench_overlap.py --simulated-step-ms 8 --slots 8 64 256 1024 --json
    python scripts/bench_overlap.py --slots 32 --trace

The same requests go through a synchronous engine (--pipeline-depth 0) and a pipelined one, in turn. They are more than
there are slots, of random lengths; every other one ends at a stop id, which the host learns a step late. Figures are of
the steps between the first and the last that had every slot, and medians over the rounds:

    device_idle_ratio   part of the time that the device had nothing to do
    device_idle_in_long_gaps  the same of a trace, without the gaps that are too short to be a wait for the host
    device_idle_ratio_untraced  part of a step without a profiler that is beyond the device's time in the trace: where a
                        GPU is traced, the kernels of a program are launched one by one, and not as a graph
    gap_ms_*            from a step's end to the next one's start on the device
    overlap_efficiency  (sync - async) / (sync - device), in ms a step: 1 if all of the host's time is hidden; None if
                        there is next to none
    host_step_ms_*      the step loop's own work
    delivery_lag_ms_*   from the end of the step that made a request's last token to its client's receipt
    slot_reuse_lag_steps  most steps from a slot's last token to its next owner; 1 is the least possible
    slot_first_prompt_lag_steps  the same to the next owner's first prompt tokens, of which a step takes only so many
    overrun_rows        rows computed for sequences that had ended
    short_p99_ratio     p99 of short requests among long neighbours over that among short ones

With --simulated-step-ms the device sleeps, and its time is known. With the model it comes from a profiler's trace
(--trace, core in a thread) or, without, from the steps' records: its idle time is then a lower bound.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from benchmarks import steps
from benchmarks.churn import PROMPT_LEN, Round, Work, run_round
from benchmarks.engine_arguments import add_engine_arguments, add_run_arguments, engine_config
from benchmarks.machine import OtherLoad, process_tree
from benchmarks.neighbours import SHORT_LEN, Neighbourhood
from benchmarks.plots import require_plots
from benchmarks.summary import Figure, median_of, percentiles, report, rounded

from jaxserve import Engine
from jaxserve.core import garbage_collection
from jaxserve.core.messages import StepRecord

LEAST_HIDEABLE = 0.01
"""Part of a synchronous step below which the host's time is noise, and how much of it is hidden cannot be said."""
LONG_GAP_SECONDS = 20e-6
"""From the end of an operation to the start of the next one: more than lies between two kernels of a program."""
SHOWN_STEPS = 8
"""Steps in a drawing."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_engine_arguments(parser, several_slots=True)
    parser.add_argument("--requests-per-slot", type=int, default=3)
    parser.add_argument(
        "--output-len",
        type=int,
        default=None,
        help="tokens, on average; by default 64, and more where the prompts of "
        "so many slots would not fit into as many steps",
    )
    parser.add_argument("--text", action="store_true", help="detokenize, as for a client that wants text")
    parser.add_argument("--probes", type=int, default=200, help="short requests among neighbours; 0 leaves that out")
    parser.add_argument("--long-len", type=int, default=1900, help="tokens of a long neighbour")
    parser.add_argument("--trace", action="store_true", help="device time from a profiler's trace")
    parser.add_argument("--plot", type=Path, default=None, metavar="DIR", help="draw into this folder")
    add_run_arguments(parser, rounds=3)
    arguments = parser.parse_args()
    if arguments.trace and (arguments.core != "thread" or arguments.simulated_step_ms is not None):
        parser.error("--trace needs the model, and --core thread")
    return arguments


def device_intervals(records: Sequence[StepRecord], simulated_ms: float | None) -> list[steps.Interval]:
    """When the device worked, by its own clock or by the steps' records."""
    if simulated_ms is not None:
        return steps.simulated_intervals(records, simulated_ms / 1e3)
    return steps.observed_intervals(records)


def round_figures(one: Round, slots: int, arguments: argparse.Namespace) -> dict[str, Figure]:
    """Figures of one round in either mode."""
    # A trace covers all steps, and its clock is its own.
    loaded = slice(None) if arguments.trace else steps.full_range(one.records, slots)
    full = one.records[loaded]
    device = device_intervals(one.records, arguments.simulated_step_ms)[loaded]
    busy = steps.busy_seconds(one.trace or device)
    between = full[-1].retired - full[0].retired
    step_seconds = steps.window_seconds(full) / len(full) if arguments.trace else between / (len(full) - 1)
    host = [record.host_seconds for record in full]
    lags = [stream.delivery_lag for stream in one.streams]
    reuse = steps.reuse_lags(full)
    tokens = sum(len(stream.token_ids) for stream in one.streams)
    return {
        "step_ms": 1e3 * step_seconds,
        "device_step_ms": 1e3 * busy / len(full),
        "device_idle_ratio": max(0.0, steps.idle_ratio(one.trace or device)),
        **percentiles(steps.gaps(device), "gap_ms", 1e3),
        **percentiles(host, "host_step_ms", 1e3),
        **percentiles(lags, "delivery_lag_ms", 1e3),
        "slot_reuse_lag_steps": max(reuse, default=None),
        "slot_reuse_lag_steps_mean": statistics.mean(reuse) if reuse else None,
        "slot_first_prompt_lag_steps": max(steps.reuse_lags(full, first_piece=True), default=None),
        "slot_reuses": len(reuse),
        "overrun_rows": one.overrun_rows,
        "overrun_share": one.overrun_rows / (tokens + one.overrun_rows),
        "output_tokens_per_s": tokens / steps.window_seconds(one.records),
    }


def trace_figures(traced: Sequence[Round], untraced: Sequence[Round], pipelined: dict) -> dict[str, Figure]:
    """What a trace says of the device's idle time, and what it hides by slowing the device down."""
    in_long_gaps = [
        sum(gap for gap in steps.gaps(merged) if gap > LONG_GAP_SECONDS) / (merged[-1][1] - merged[0][0])
        for merged in (steps.union(one.trace) for one in traced)
    ]
    step_ms = statistics.median(1e3 * steps.window_seconds(one.records) / len(one.records) for one in untraced)
    return {
        "device_idle_in_long_gaps": rounded(statistics.median(in_long_gaps)),
        "untraced_step_ms": rounded(step_ms),
        "device_idle_ratio_untraced": rounded(max(0.0, 1 - pipelined["device_step_ms"] / step_ms)),
    }


def run_neighbours(engine: Engine, arguments: argparse.Namespace) -> dict[str, Figure]:
    """p99 of short requests among long and among short neighbours, in turn, and the ratio."""
    p99: dict[str, list[float]] = {"long": [], "short": []}
    probes = max(arguments.probes, 2 * engine.config.slots)
    for number in range(arguments.rounds):
        for kind, length in (("long", arguments.long_len), ("short", SHORT_LEN)):
            seconds = Neighbourhood(engine, length, seed=number).measure(probes)
            p99[kind].append(1e3 * float(np.percentile(seconds, 99)))
    long, short = (statistics.median(p99[kind]) for kind in ("long", "short"))
    return {
        "short_p99_ms_long_neighbours": rounded(long),
        "short_p99_ms_short_neighbours": rounded(short),
        "short_p99_ratio": rounded(long / short),
    }


def overlap_figures(synchronous: dict, pipelined: dict, arguments: argparse.Namespace) -> dict[str, Figure]:
    """How much of the host's time the pipelined engine hides, from both modes' figures."""
    source = "trace" if arguments.trace else "records"
    if arguments.simulated_step_ms is not None:
        source = "simulated clock"
    # Records tell the device's time apart from the host's only where they take turns.
    device = (synchronous if source == "records" else pipelined)["device_step_ms"]
    sync, overlapped = synchronous["step_ms"], pipelined["step_ms"]
    hideable = sync - device
    return {
        "sync_step_ms": sync,
        "async_step_ms": overlapped,
        "device_step_ms": device,
        "device_time_from": source,
        "overlap_efficiency": rounded((sync - overlapped) / hideable) if hideable > LEAST_HIDEABLE * sync else None,
        "device_idle_ratio_sync": synchronous["device_idle_ratio"],
    }


@dataclass
class Run:
    """A measured number of slots."""

    slots: int
    figures: dict[str, Figure]
    synchronous: list[StepRecord]
    pipelined: list[StepRecord]


def run_slots(slots: int, arguments: argparse.Namespace) -> Run:
    """Measures an engine with this many slots, synchronous and pipelined."""
    count = slots * arguments.requests_per_slot
    config = engine_config(arguments, slots=slots, max_waiting=count)
    with Engine(replace(config, pipeline_depth=0)) as synchronous, Engine(config) as pipelined:
        garbage_collection.quieten()  # as in a server
        rounds: dict[Engine, list[Round]] = {synchronous: [], pipelined: []}
        output_len = arguments.output_len or max(64, PROMPT_LEN * slots // (config.prefill_chunks[0] // 2))
        work = Work.make(count, output_len, pipelined.model_config.vocab_size)
        work.stop_every_other(run_round(pipelined, work.requests("learn", arguments.text)).streams)
        load = OtherLoad(process_tree(os.getpid()))
        untraced: list[Round] = []
        for number in range(arguments.rounds):
            for engine, done in rounds.items():
                done.append(run_round(engine, work.requests(str(number), arguments.text), arguments.trace))
            if arguments.trace:
                untraced.append(run_round(pipelined, work.requests(f"{number} untraced", arguments.text)))
        neighbours = run_neighbours(pipelined, arguments) if arguments.probes else {}
        other_load = load.share()
        device = pipelined.device.device_kind
    sync, overlapped = (median_of([round_figures(one, slots, arguments) for one in done]) for done in rounds.values())
    figures = {
        "slots": slots,
        "device": device,
        **{name: value for name, value in overlapped.items() if name != "step_ms"},
        **overlap_figures(sync, overlapped, arguments),
        **(trace_figures(rounds[pipelined], untraced, overlapped) if arguments.trace else {}),
        **neighbours,
        "other_load": other_load and rounded(other_load),
    }
    return Run(slots, figures, rounds[synchronous][-1].records, rounds[pipelined][-1].records)


def draw(runs: list[Run], arguments: argparse.Namespace) -> None:
    """Draws the steps of the first run, and the host's time over the slots."""
    from benchmarks import plots

    first = runs[0]
    lanes = {}
    for name, records in (("synchronous", first.synchronous), ("pipelined", first.pipelined)):
        start = steps.full_range(records, first.slots).start + SHOWN_STEPS
        shown = slice(start, start + SHOWN_STEPS)
        lanes[name] = {
            "device": device_intervals(records, arguments.simulated_step_ms)[shown],
            "host": steps.host_intervals(records)[shown],
        }
    plots.timeline(arguments.plot / "overlap_timeline.png", lanes, f"Steps at {first.slots} slots")
    if len(runs) > 1:
        series = {
            name: [(run.slots, float(run.figures[f"host_step_ms_{name}"] or 0)) for run in runs]
            for name in ("p50", "p99")
        }
        plots.lines(arguments.plot / "host_over_slots.png", series, "slots", "host, ms a step")


def main() -> int:
    """Runs the benchmark."""
    arguments = parse_arguments()
    if arguments.plot is not None:
        require_plots()
    runs = []
    for slots in arguments.slots:
        print(f"measuring {slots} slots", file=sys.stderr)
        runs.append(run_slots(slots, arguments))
    if arguments.plot is not None:
        draw(runs, arguments)
    settings = {
        "model": arguments.model if arguments.simulated_step_ms is None else "simulated",
        "simulated_step_ms": arguments.simulated_step_ms,
        "pipeline_depth": arguments.pipeline_depth,
        "core": arguments.core,
        "rounds": arguments.rounds,
    }
    if len(runs) == 1:
        report({**settings, **runs[0].figures}, arguments.json)
    else:
        # In JSON the first run's figures stand at the top as well, where those of a single run are.
        report({**settings, "runs": [run.figures for run in runs]}, arguments.json, also=runs[0].figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
