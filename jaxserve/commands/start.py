"""What the commands share: exit statuses, and starting an engine whose failures are one line each."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

from jaxserve.commands.progress import ProgressDisplay
from jaxserve.config import EngineConfig

if TYPE_CHECKING:
    from jaxserve.engine import Engine


class ExitStatus(IntEnum):
    """What the commands return. A server that was stopped before its requests were done returns 3."""

    SUCCESS = 0
    REQUESTS_FAILED = 1
    """Some requests were refused or failed, and the others were done; or results could not be written."""
    UNUSABLE = 2
    """The command line, the configuration or the model is at fault. argparse returns the same."""
    DOES_NOT_FIT = 4
    """`plan`: the model does not fit the device."""
    INTERRUPTED = 130
    """SIGINT, as shells report it."""


class CommandError(Exception):
    """Ends a command with this message, on one line, and with `status`."""

    status = ExitStatus.UNUSABLE


class OutputError(CommandError):
    """Results cannot be written: the disk is full, say. The command line is not at fault."""

    status = ExitStatus.REQUESTS_FAILED


@contextmanager
def output_errors(name: str = "standard output") -> Iterator[None]:
    """Turns what keeps results from being written into an OutputError, but for a reader that has gone."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"{name}: cannot be written: {error.strerror or error}") from error


@contextmanager
def model_errors() -> Iterator[None]:
    """Turns what is wrong with a model or its configuration, and what cannot be read, into a CommandError."""
    from jaxserve.checkpoints.tensors import CheckpointError
    from jaxserve.device.errors import AllocationError, PlacementError
    from jaxserve.models.config import UnsupportedModel
    from jaxserve.tokenizing.token_bytes import TokenizerError

    try:
        yield
    except BrokenPipeError:  # of who reads the progress
        raise
    except (AllocationError, CheckpointError, OSError, PlacementError, TokenizerError, UnsupportedModel) as error:
        raise CommandError(str(error)) from error


def start_engine(config: EngineConfig) -> "Engine":
    """An engine that is ready; progress is shown meanwhile. Raises CommandError where it cannot start."""
    with ProgressDisplay() as progress, ended_by_interrupts(progress.clear):
        progress("starting", None)  # the core, which imports JAX, tells of nothing for a second
        from jaxserve.engine import Engine, EngineStartError

        try:
            engine = Engine(config, progress=progress)
        except EngineStartError as error:
            raise CommandError(str(error)) from error
        progress.finish(f"{engine.model_name} is ready on {engine.device.device_kind}")
        return engine


@contextmanager
def ended_by_interrupts(clean_up: Callable[[], None]) -> Iterator[None]:
    """SIGINT ends the process once it has cleaned up, unless it is ignored or has a handler, as a server's.

    An exception would not do: Python loses those that come in a callback of the collector, and may keep the lock of its
    imports then, for which the core waits; and native code that loads or compiles on another thread cannot be stopped,
    and would crash in an interpreter that shuts down around it.
    """

    def end(*_: object) -> None:
        try:
            clean_up()
        finally:
            os._exit(ExitStatus.INTERRUPTED)

    raising = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raising:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        if raising:
            signal.signal(signal.SIGINT, signal.default_int_handler)
