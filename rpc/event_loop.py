"""The event loop of a process that streams."""

import asyncio
import importlib.util


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where that is installed, which takes less CPU time a message; else asyncio's own."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    import uvloop

    return uvloop.new_event_loop()
