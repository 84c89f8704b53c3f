"""A process with all that it starts: its lines as they come, and one end for all of them."""

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TICK_SECONDS = 0.1
KILL_SECONDS = 10.0
"""For which an end is waited for: a process that a driver holds may have none."""
MOST_SAID = 3000
"""Characters of what was said on stderr."""


@dataclass(frozen=True)
class Ending:
    """How it ended."""

    failure: str | None
    """None where the process itself ended well."""
    said: str
    """The end of what it and its workers wrote to stderr."""


def run_group(
    command: Sequence[str],
    environment: Mapping[str, str],
    take: Callable[[bytes], None],
    *,
    seconds: float,
    quiet_seconds: float,
) -> Ending:
    """Runs a command, and leaves neither a process of its group nor a temporary file behind.

    Args:
        command: the process.
        environment: its own; temporary files go to a folder that is removed here, as a killed process removes none.
        take: is given each whole line of stdout as it comes.
        seconds: after which all of it is killed.
        quiet_seconds: likewise, without a line.
    """
    with (
        tempfile.TemporaryDirectory(prefix="gpu_check", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile("w+b") as errors,
    ):
        # A group and no session: what ends this process's session from outside ends these as well.
        process = subprocess.Popen(
            command,
            env={**environment, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            process_group=0,
        )
        assert process.stdout is not None
        lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            failure = _follow(process.pid, lines, take, seconds, quiet_seconds)
        finally:
            code = _end(process)
        reader.join(timeout=1)
        while not lines.empty():
            take(lines.get())
        if failure is None and code != 0:
            failure = f"ended with {code}"
        errors.seek(max(0, errors.seek(0, os.SEEK_END) - MOST_SAID))
        return Ending(failure, errors.read().decode(errors="replace"))


def _read(stdout: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    with stdout:
        for line in stdout:
            if line.endswith(b"\n"):  # one that is cut off has no end
                lines.put(line)


def _follow(
    pid: int, lines: queue.SimpleQueue[bytes], take: Callable[[bytes], None], seconds: float, quiet_seconds: float
) -> str | None:
    start = last = time.monotonic()
    # Not up to the end of stdout, which a worker may hold open. The process is left to be waited for: until then its
    # number, which is the group's, is nobody else's.
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        try:
            line = lines.get(timeout=TICK_SECONDS)
        except queue.Empty:
            now = time.monotonic()
        else:
            take(line)
            now = last = time.monotonic()
        if now - start >= seconds:
            return f"stopped after {seconds:.0f} s"
        if now - last >= quiet_seconds:
            return f"gave nothing for {quiet_seconds:.0f} s"
    return None


def _end(process: subprocess.Popen[bytes]) -> int | None:
    """Kills the group and waits for it, but not for ever. The process's exit code, None where it does not end."""
    end = time.monotonic() + KILL_SECONDS
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        code = process.wait(timeout=KILL_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    # Its workers hold the device's memory until they are gone as well.
    while _alive(process.pid) and time.monotonic() < end:
        time.sleep(TICK_SECONDS)
    return code


def _alive(group: int) -> bool:
    """Whether the group has a process that is more than an entry for its parent: not every container's first process
    takes those of orphans away."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False
