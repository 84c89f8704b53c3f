import os
import sys
from pathlib import Path

import pytest
from serving import server_process

SIMULATED = """
from jaxserve.engine import Engine
def engine_factory():
    return Engine(simulated_step_ms=1.0, slots=2, max_context=64)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no batch threads")
def test_of_a_servers_threads_the_one_that_polls_for_grpc_alone_does_not_interrupt() -> None:
    with server_process(SIMULATED) as server:
        server.report("ready")
        threads = [int(task.name) for task in Path(f"/proc/{server.process.pid}/task").iterdir()]
        assert [os.sched_getscheduler(thread) for thread in threads].count(os.SCHED_BATCH) == 1
        assert os.sched_getscheduler(server.process.pid) == os.SCHED_OTHER
