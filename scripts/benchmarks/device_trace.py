"""Device time from a `jax.profiler` trace."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.profiler import ProfileData

from benchmarks.steps import Interval


class DeviceTrace:
    """Filled when the traced block ends."""

    def __init__(self) -> None:
        self.intervals: list[Interval] = []
        """Of each device operation, in seconds of the profiler's clock."""


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
            trace.intervals += _intervals(file)
    if not trace.intervals:
        raise RuntimeError("the trace has no device operation")


def _intervals(file: Path) -> Iterator[Interval]:
    for plane in ProfileData.from_file(str(file)).planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            # A GPU's or TPU's lines of operations; on a CPU, the threads that XLA runs them on.
            if not ((on_device and ("Stream" in line.name or line.name == "XLA Ops")) or "XLA" in line.name):
                continue
            for event in line.events:
                if event.name.startswith("Wait"):
                    continue
                yield event.start_ns * 1e-9, (event.start_ns + event.duration_ns) * 1e-9
