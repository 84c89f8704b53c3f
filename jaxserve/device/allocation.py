"""How many pages the KV cache gets: one rule for the engine, `jaxserve info` and `jaxserve plan`."""

from dataclasses import dataclass

from jaxserve.config import EngineConfig
from jaxserve.device.errors import AllocationError
from jaxserve.device.kv_cache import cache_dtype, page_bytes
from jaxserve.device.sharding import JaxDevice, Placement
from jaxserve.models.config import ModelConfig
from jaxserve.request import MAX_LOGIT_BIAS
from pallas_kernels import AttentionNeeds, PagedAttention

DEFAULT_CONTEXT = 8192
"""Tokens of `max_context` where the configuration leaves it open and the model allows more."""
HOST_CACHE_BYTES = 2 << 30
"""Bound of the cache where neither the configuration nor the device gives one: a CPU shares its memory with others."""
HEADROOM = 0.03
"""Share of a device's memory that is left free: compiled programs, uploads and outputs on their way, fragmentation."""


@dataclass(frozen=True)
class Allocation:
    """Who has how much of a device's memory, in bytes; of one of the devices that share a model."""

    limit: int | None
    """What programs can have of the device; None where it does not say."""
    weights: int
    state: int
    """Of `DecodeState`."""
    temporaries: int
    """What a step needs while it runs, and code that is more than half of the headroom."""
    headroom: int
    page: int
    """A page of the cache, over all layers."""
    num_pages: int
    """Pages to allocate, page 0 included."""
    wanted_pages: int
    """Enough for every slot at full context, page 0 included."""

    @property
    def cache(self) -> int:
        """The cache."""
        return self.num_pages * self.page


def full_context(model: ModelConfig, config: EngineConfig) -> int:
    """Tokens of prompt and output together that a request may have, as far as its pages suffice. Raises AllocationError
    for more than the model takes."""
    if config.max_context is None:
        return min(DEFAULT_CONTEXT, model.max_context)
    if config.max_context > model.max_context:
        raise AllocationError(
            f"max_context: must be at most {model.max_context}, the model's, got {config.max_context}"
        )
    return config.max_context


def context_pages(model: ModelConfig, config: EngineConfig) -> int:
    """Pages of a request at full context."""
    return -(-full_context(model, config) // config.page_size)


def attention_needs(model: ModelConfig, config: EngineConfig, device_kind: str | None = None) -> AttentionNeeds:
    """What the engine will ask of attention, on a device of this kind as JAX names it."""
    group = model.num_q_heads // model.num_kv_heads
    max_pages = context_pages(model, config)
    return AttentionNeeds(cache_dtype(config), group=group, max_pages=max_pages, device_kind=device_kind)


def allocate(
    model: ModelConfig,
    attention: PagedAttention,
    config: EngineConfig,
    *,
    limit: int | None,
    weights: int,
    temporaries: int | None = None,
) -> Allocation:
    """The pages of a configuration: `num_pages` as given, or else enough for every slot at full context, as far as
    `cache_bytes` allows or, where that is not given, the device's memory.

    Args:
        model: the model.
        attention: gives the cache's layout.
        config: the engine's configuration; `cache_bytes` is of one device.
        limit: bytes that programs can have of a device, None where it has no limit of its own.
        weights: bytes of the device that are taken before the cache is made.
        temporaries: bytes that the compiled steps need, as `lowering.needed_bytes` counts; None estimates them.

    Raises AllocationError where the cache would have no page.
    """
    a_page = page_bytes(model, attention, config)
    state = config.slots * (model.vocab_size * 5 + MAX_LOGIT_BIAS * 8 + 5)
    temporaries = estimated_temporaries(model, config) if temporaries is None else temporaries
    headroom = 0 if limit is None else int(limit * HEADROOM)
    wanted = config.slots * context_pages(model, config) + 1
    if config.num_pages is not None:
        pages = config.num_pages
    elif config.cache_bytes is not None or limit is None:
        cache_bytes = config.cache_bytes or HOST_CACHE_BYTES
        pages = min(wanted, cache_bytes // a_page)
        if pages < 2:
            raise AllocationError(
                f"cache_bytes: must be at least {2 * a_page}, two pages of {config.page_size} tokens, got {cache_bytes}"
            )
    else:
        pages = min(wanted, (limit - weights - state - temporaries - headroom) // a_page)
    allocation = Allocation(limit, weights, state, temporaries, headroom, a_page, pages, wanted)
    if limit is not None:
        _check(allocation, limit)
    return allocation


def _check(allocation: Allocation, limit: int) -> None:
    taken = allocation.weights + allocation.state + allocation.temporaries + allocation.headroom
    if allocation.num_pages < 2 or taken + allocation.cache > limit:
        raise AllocationError(
            f"does not fit: of a device's {limit / 1e9:.2f} GB, weights take {allocation.weights / 1e9:.2f}, decode "
            f"state {allocation.state / 1e9:.2f}, a step's temporaries {allocation.temporaries / 1e9:.2f}, headroom "
            f"{allocation.headroom / 1e9:.2f}, and {max(allocation.num_pages, 2)} pages "
            f"{max(allocation.num_pages, 2) * allocation.page / 1e9:.2f}"
        )


def estimated_temporaries(model: ModelConfig, config: EngineConfig) -> int:
    """Bytes that a step of this configuration needs while it runs, before it is compiled: no less than was seen for the
    models and devices of `tests/aot`."""
    tokens = config.slots + max(config.prefill_chunks)
    layer = 4 * model.hidden_size + 2 * (model.q_size + 2 * model.kv_size) + 3 * model.intermediate_size
    forward, choose = 4 * tokens * layer, 8 * 4 * config.slots * model.vocab_size
    return max(forward, choose)  # the halves of a step run one after the other


def device_limit(placement: Placement) -> int | None:
    """Bytes that programs can have of each of the devices, by their allocators; None where they do not say."""
    limits = [_memory(device, "bytes_limit") for device in placement.devices]
    return min((limit for limit in limits if limit is not None), default=None)


def device_in_use(placement: Placement) -> int:
    """Bytes taken of the fullest of the devices; 0 where they do not say."""
    return max(_memory(device, "bytes_in_use") or 0 for device in placement.devices)


def _memory(device: JaxDevice, figure: str) -> int | None:
    """A figure of `jax.Device.memory_stats`, which gives none for a CPU."""
    stats = device.memory_stats()
    return None if stats is None else stats.get(figure)
