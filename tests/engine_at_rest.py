"""Whether an engine has given back all that it lent."""

import time

from jaxserve.engine import Engine


def all_pages_are_back(engine: Engine) -> bool:
    """Within moments: a request that was aborted has ended before the step in flight gives back its pages. Counts
    looks, not seconds: a machine may pause for minutes."""
    for _ in range(2000):
        loads = engine.loads()
        if (loads.running, loads.waiting, loads.available_pages) == (0, 0, loads.total_pages):
            return True
        time.sleep(0.005)
    return False
