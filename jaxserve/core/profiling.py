"""Traces of a running engine by jax.profiler, taken where the device is: in the core's process."""

import threading
import time
from collections.abc import Callable

from jaxserve.core.messages import Profile, Profiled

MAX_SECONDS = 60.0
"""Longest trace: a busy engine writes tens of MB a second."""


def start_trace(profile: Profile, report: Callable[[Profiled], None]) -> None:
    """Takes a trace on a thread of its own, so that the step loop goes on, and reports when it is written."""
    taking = threading.Thread(target=lambda: report(_take(profile)), name="jaxserve-profile", daemon=True)
    try:
        taking.start()
    except RuntimeError as error:  # the system has no thread left: the loop needs none
        report(Profiled(str(error)))


def _take(profile: Profile) -> Profiled:
    import jax

    try:
        with jax.profiler.trace(profile.folder):
            time.sleep(profile.seconds)
    except Exception as error:  # the profiler is another's, and the folder the operator's: neither may end the engine
        return Profiled(f"{type(error).__name__}: {error}")
    return Profiled(None)
