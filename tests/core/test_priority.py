"""A core on the CPU gives way."""

import json
import os
import subprocess
import sys

import pytest

from jaxserve.core.priority import NICENESS

PROGRAM = """
import json, os, threading
from jaxserve.core.priority import give_way

def niceness(*_):
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

go_on, found = threading.Event(), []
early = threading.Thread(target=lambda: (go_on.wait(), found.append(niceness())))
early.start()
give_way()
go_on.set()
early.join()
late = threading.Thread(target=lambda: found.append(niceness()))
late.start()
late.join()
print(json.dumps([niceness(), *found]))
"""


@pytest.mark.parametrize("before", [0, 3, 18])
def test_all_threads_give_way_from_where_the_operator_put_them(before: int):
    command = ["nice", "-n", str(before), sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lowest = 19
    assert json.loads(done.stdout) == [min(os.nice(0) + before + NICENESS, lowest)] * 3
