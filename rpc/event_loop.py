"""The event loop of a process that streams, and the thread of gRPC that feeds it."""

import asyncio
import contextlib
import importlib.util
import os
import sys
import threading


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where that is installed, which takes less CPU time a message; else asyncio's own."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()


def let_completions_gather() -> None:
    """Keeps gRPC's polling thread from interrupting whoever runs; on Linux, once a server or channel is there.

    The thread tells the event loop of each write that is done, and would be switched to for every token of a step. As a
    batch thread it waits until a processor is free, or the loop has nothing left to write: then it has all of them.
    """
    if sys.platform != "linux":
        return
    for thread in threading.enumerate():
        if "_poll_wrapper" in thread.name and thread.native_id is not None:
            with contextlib.suppress(PermissionError):  # a sandbox may forbid it
                os.sched_setscheduler(thread.native_id, os.SCHED_BATCH, os.sched_param(0))
