"""Where the device is the CPU, steps take all of its time, and who has a token to deliver would have to wait."""

import contextlib
import os
from pathlib import Path

NICENESS = 5
"""How far a core on a CPU gives way: for a core that both want, it gets a quarter of the time."""


def give_way() -> None:
    """Lowers the priority of this process, whose device is the CPU, for good.

    The threads of a step wait for each other at each product. While the front and a client, each on a core of its own
    and at the same time, do their work for the tokens of a step, the next step is held up once; where they have to take
    turns with its threads they hold up now the one and now the other.
    """
    niceness = os.nice(0) + NICENESS
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        os.nice(NICENESS)
        return
    for task in tasks.iterdir():  # on Linux each thread has a priority of its own, and hands it down
        with contextlib.suppress(ProcessLookupError):  # the thread has ended meanwhile
            os.setpriority(os.PRIO_PROCESS, int(task.name), niceness)
