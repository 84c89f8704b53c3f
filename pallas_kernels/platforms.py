"""Which implementation serves which platform: chosen before tracing, from the target platform given explicitly.

Not from `jax.default_backend()`, which says `cpu` while a program is compiled ahead of time for another platform.
"""

from collections.abc import Callable
from typing import Literal

from pallas_kernels.interface import PagedAttention
from pallas_kernels.reference import ReferencePagedAttention
from pallas_kernels.xla import XlaPagedAttention

Platform = Literal["cpu", "tpu", "cuda"]

IMPLEMENTATIONS: dict[str, dict[str, Callable[[], PagedAttention]]] = {
    "cpu": {"cpu_xla": lambda: XlaPagedAttention("cpu_xla"), "reference": ReferencePagedAttention},
    "tpu": {"xla": XlaPagedAttention, "reference": ReferencePagedAttention},
    "cuda": {"xla": XlaPagedAttention, "reference": ReferencePagedAttention},
}
"""Of each platform, its implementations by name; the first is the platform's own."""


def select(platform: Platform, implementation: str | None = None) -> PagedAttention:
    """The implementation for a platform, with the cache layout that goes with it.

    Args:
        platform: the platform that the program will run on.
        implementation: a name of `IMPLEMENTATIONS[platform]`; None takes the platform's own.

    Raises:
        ValueError: no such platform, or no such implementation for it; lists those there are.
    """
    if platform not in IMPLEMENTATIONS:
        raise ValueError(f"no paged attention for platform {platform!r}; there are {', '.join(IMPLEMENTATIONS)}")
    named = IMPLEMENTATIONS[platform]
    name = next(iter(named)) if implementation is None else implementation
    if name not in named:
        raise ValueError(f"no attention {name!r} on {platform}; there are {', '.join(named)}")
    return named[name]()
