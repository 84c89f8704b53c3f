"""Which implementation serves which platform: chosen before tracing, from the target platform given explicitly.

Not from `jax.default_backend()`, which says `cpu` while a program is compiled ahead of time for another platform.
"""

import logging
from collections.abc import Callable

from pallas_kernels.cpu_native import NativePagedAttention
from pallas_kernels.interface import AttentionNeeds, PagedAttention
from pallas_kernels.native_build import NativeUnavailable
from pallas_kernels.reference import ReferencePagedAttention
from pallas_kernels.xla import XlaPagedAttention

log = logging.getLogger(__name__)


# Pallas for GPUs and Pallas for TPUs are imported where they are used: each takes a while.
def _mosaic_gpu() -> PagedAttention:
    from pallas_kernels.mosaic_gpu import MosaicGpuPagedAttention

    return MosaicGpuPagedAttention()


def _mosaic_tpu() -> PagedAttention:
    from pallas_kernels.mosaic_tpu import MosaicTpuPagedAttention

    return MosaicTpuPagedAttention()


IMPLEMENTATIONS: dict[str, dict[str, Callable[[], PagedAttention]]] = {
    "cpu": {
        "cpu_native": NativePagedAttention.build,
        "cpu_xla": lambda: XlaPagedAttention("cpu_xla"),
        "reference": ReferencePagedAttention,
    },
    "tpu": {"mosaic_tpu": _mosaic_tpu, "xla": XlaPagedAttention, "reference": ReferencePagedAttention},
    "cuda": {"mosaic_gpu": _mosaic_gpu, "xla": XlaPagedAttention, "reference": ReferencePagedAttention},
}
"""Of each platform, its implementations by name, the preferred first."""


PLAIN = AttentionNeeds()


def select(platform: str, implementation: str | None = None, needs: AttentionNeeds = PLAIN) -> PagedAttention:
    """The implementation for a platform, with the cache layout that goes with it.

    Args:
        platform: the platform that the program will run on, a key of `IMPLEMENTATIONS`.
        implementation: a name of `IMPLEMENTATIONS[platform]`; None takes the first that has what is needed and, for
            `cpu_native`, can be built. The log says why one was passed over.
        needs: what the engine will ask of it.

    Raises:
        ValueError: no such platform, no such implementation for it, or one that lacks what is needed; lists those there
            are, or says what it lacks.
        NativeUnavailable: `cpu_native` was asked for by name and cannot be built.
    """
    if platform not in IMPLEMENTATIONS:
        raise ValueError(f"no paged attention for platform {platform!r}; there are {', '.join(IMPLEMENTATIONS)}")
    named = IMPLEMENTATIONS[platform]
    if implementation is not None:
        if implementation not in named:
            raise ValueError(f"no attention {implementation!r} on {platform}; there are {', '.join(named)}")
        chosen = named[implementation]()
        if (reason := chosen.missing(needs)) is not None:
            raise ValueError(f"attention {implementation}: {reason}")
        return chosen
    reasons = []
    for name, build in named.items():
        try:
            chosen = build()
        except NativeUnavailable as error:
            reasons.append(f"{name}: {error}")
            continue
        if (reason := chosen.missing(needs)) is None:
            if reasons:
                log.warning("attention %s instead of %s", name, "; ".join(reasons))
            return chosen
        reasons.append(f"{name}: {reason}")
    raise ValueError(f"no attention on {platform} has what is needed: {'; '.join(reasons)}")
