"""The other side of `LimitedProcess`: a program that answers lines of JSON, under limits that it sets for itself."""

import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any


def answer_lines(prepare: Callable[[dict[str, Any]], Callable[[Any], object]]) -> None:
    """Gives each line an answer, a line of JSON as well, until there are no more.

    The first line is the settings: `prepare` makes of them what answers, and a line says that it has. From then on the
    program has `memory_bytes` of address space, and when an answer takes more than `cpu_seconds` of processor time, the
    kernel ends the program (SIGPROF).
    """
    # What a terminal or a service manager sends to every process is for the server, which ends this program.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # would be inherited where the server ignores it
    lines = sys.stdin.buffer
    settings = json.loads(lines.readline())
    answer = prepare(settings)
    resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _say("null")
    for line in lines:
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_seconds"])
        reply = json.dumps(answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(reply)


def _say(line: str) -> None:
    sys.stdout.buffer.write(line.encode() + b"\n")
    sys.stdout.buffer.flush()
