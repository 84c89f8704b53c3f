"""Which implementation serves which platform: chosen before tracing, from the target platform given explicitly.

Not from `jax.default_backend()`, which says `cpu` while a program is compiled ahead of time for another platform.
"""

import logging
from collections.abc import Callable

from pallas_kernels.cpu_native import NativePagedAttention
from pallas_kernels.interface import PagedAttention
from pallas_kernels.native_build import NativeUnavailable
from pallas_kernels.reference import ReferencePagedAttention
from pallas_kernels.xla import XlaPagedAttention

log = logging.getLogger(__name__)

IMPLEMENTATIONS: dict[str, dict[str, Callable[[], PagedAttention]]] = {
    "cpu": {
        "cpu_native": NativePagedAttention.build,
        "cpu_xla": lambda: XlaPagedAttention("cpu_xla"),
        "reference": ReferencePagedAttention,
    },
    "tpu": {"xla": XlaPagedAttention, "reference": ReferencePagedAttention},
    "cuda": {"xla": XlaPagedAttention, "reference": ReferencePagedAttention},
}
"""Of each platform, its implementations by name, the preferred first."""


def select(platform: str, implementation: str | None = None) -> PagedAttention:
    """The implementation for a platform, with the cache layout that goes with it.

    Args:
        platform: the platform that the program will run on, a key of `IMPLEMENTATIONS`.
        implementation: a name of `IMPLEMENTATIONS[platform]`; None takes the platform's own. On the CPU that is
            `cpu_native`, or `cpu_xla` where it cannot be built, with the reason in the log.

    Raises:
        ValueError: no such platform, or no such implementation for it; lists those there are.
        NativeUnavailable: `cpu_native` was asked for by name and cannot be built.
    """
    if platform not in IMPLEMENTATIONS:
        raise ValueError(f"no paged attention for platform {platform!r}; there are {', '.join(IMPLEMENTATIONS)}")
    named = IMPLEMENTATIONS[platform]
    if implementation is not None:
        if implementation not in named:
            raise ValueError(f"no attention {implementation!r} on {platform}; there are {', '.join(named)}")
        return named[implementation]()
    preferred, fallback, *_ = named
    try:
        return named[preferred]()
    except NativeUnavailable as error:
        log.warning("attention %s instead of %s: %s", fallback, preferred, error)
        return named[fallback]()
