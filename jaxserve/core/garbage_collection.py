"""Garbage collection for a process that does nothing but serve."""

import gc

YOUNG_OBJECTS = 20_000
"""Objects made since the last collection that bring about the next: tens of steps' worth, nearly all dead by then."""


def quieten() -> None:
    """Keeps collections short and rare. For a process of our own, once it is ready: the settings are the process's.

    Objects of a step die by their reference counts. At Python's defaults the collector still comes by several times a
    step, takes what is in flight for long-lived, and so runs into full collections, which look at everything that JAX
    and the model's code brought along: 100 ms and more in which no token moves. What is there now is set aside.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 50, 100)
