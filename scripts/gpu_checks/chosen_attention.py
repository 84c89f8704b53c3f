"""The attention that an engine takes on this device."""

import jax

from pallas_kernels import AttentionNeeds, PagedAttention, select


def chosen_attention(
    dtype: str, *, softcap: bool = False, sinks: bool = False, name: str | None = None
) -> PagedAttention:
    """For a cache of `dtype` and these needs; with `name`, that one."""
    device = jax.devices()[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    return select(platform, name, AttentionNeeds(dtype, softcap, sinks, device_kind=device.device_kind))
