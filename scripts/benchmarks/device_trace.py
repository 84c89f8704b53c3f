"""Device time from a `jax.profiler` trace."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.profiler import ProfileData

from benchmarks.steps import Interval


class DeviceTrace:
    """Filled when the traced block ends."""

    def __init__(self) -> None:
        self.operations: list[tuple[str, Interval]] = []
        """Name and time of each device operation, in seconds of the profiler's clock."""

    @property
    def intervals(self) -> list[Interval]:
        """When the device was at an operation."""
        return [interval for _, interval in self.operations]

    def by_operation(self) -> list[tuple[str, int, float]]:
        """Operations that differ in a number at most, as a name, how many there were and their seconds; longest first.

        Example: `fusion.1` and `fusion_12` are both `fusion`.
        """
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        for name, (start, end) in self.operations:
            seconds[re.sub(r"[._]\d+", "", name)].append(end - start)
        summed = [(kind, len(each), sum(each)) for kind, each in seconds.items()]
        return sorted(summed, key=lambda operation: -operation[2])


@contextmanager
def trace_device() -> Iterator[DeviceTrace]:
    """Traces the device operations of this process while the block runs.

    Raises RuntimeError where the trace has none: operations of another process are not seen.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 2  # on a CPU, operations are events of the host
    trace = DeviceTrace()
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            yield trace
        finally:
            jax.profiler.stop_trace()
        for file in Path(folder).rglob("*.xplane.pb"):
            trace.operations += _operations(file)
    if not trace.operations:
        raise RuntimeError("the trace has no device operation")


def _operations(file: Path) -> Iterator[tuple[str, Interval]]:
    for plane in ProfileData.from_file(str(file)).planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            # A GPU's or TPU's lines of operations; on a CPU, the threads that XLA runs them on.
            if not ((on_device and ("Stream" in line.name or line.name == "XLA Ops")) or "XLA" in line.name):
                continue
            for event in line.events:
                if event.name.startswith("Wait"):
                    continue
                yield event.name, (event.start_ns * 1e-9, (event.start_ns + event.duration_ns) * 1e-9)
