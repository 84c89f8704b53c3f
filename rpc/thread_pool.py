"""Pools of threads that do what an event loop must not wait for."""

import threading
from concurrent.futures import ThreadPoolExecutor


def started_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool whose threads are there from the start. Raises RuntimeError where the system has no more of them.

    A pool that starts its threads as tasks come, and gets none, raises and keeps the task: it runs later, for a client
    that was told of an error.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    all_there = threading.Barrier(threads)
    try:
        for waiting in [pool.submit(all_there.wait) for _ in range(threads)]:
            waiting.result()
    except RuntimeError:
        all_there.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    return pool
