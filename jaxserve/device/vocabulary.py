"""Looking through the vocabulary, row by row, in the way that is best on each platform."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from jaxserve.device.thresholds import FindThresholds, xla_thresholds
from pallas_kernels import native_build
from pallas_kernels.sampling_thresholds import sampling_thresholds

BLOCK = 128
"""Tokens that are looked at together before the whole is."""

Logits = Float[Array, "row vocab"]


@dataclass(frozen=True)
class VocabularySearch:
    """What is looked for in the rows of a step; the same tokens on every platform."""

    argmax: Callable[[Logits], Int32[Array, " row"]]
    """The first of each row's largest."""
    top_k: Callable[[Logits, int], tuple[Float[Array, "row top"], Int32[Array, "row top"]]]
    """As `lax.top_k`: values, falling, and their tokens, of equals the first."""
    thresholds: FindThresholds
    """Where top-k and top-p cut."""


def search_on(platform: str) -> VocabularySearch:
    """That of a platform, which is given and not asked of JAX: steps are compiled for others too.

    XLA looks through whole rows slowly where it has no instruction for it: on a CPU for a maximum, on GPUs, where it
    sorts them, for the largest few.
    """
    if platform == "cpu":
        native = native_build.available()
        return VocabularySearch(block_argmax, block_top_k, sampling_thresholds if native else xla_thresholds)
    return VocabularySearch(_argmax, block_top_k if platform == "cuda" else lax.top_k, xla_thresholds)


def in_blocks(values: Logits, filler: float) -> Float[Array, "row vocab_block block"]:
    """Each row cut into blocks, the last one filled up."""
    padded = jnp.pad(values, ((0, 0), (0, -values.shape[-1] % BLOCK)), constant_values=filler)
    return padded.reshape(values.shape[0], -1, BLOCK)


def block_argmax(logits: Logits) -> Int32[Array, " row"]:
    """The best block, then the best in it: one pass, which vectorizes."""
    blocks = in_blocks(logits, -jnp.inf)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    best = jnp.argmax(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], axis=-1)
    return (block * BLOCK + best).astype(jnp.int32)


def block_top_k(logits: Logits, count: int) -> tuple[Float[Array, "row top"], Int32[Array, "row top"]]:
    """Of the blocks with the largest maxima: no other can have one of the largest."""
    blocks = in_blocks(logits, -jnp.inf)
    _, chosen = lax.top_k(jnp.max(blocks, axis=-1), min(count, blocks.shape[1]))
    chosen = jnp.sort(chosen, axis=-1)  # of equals, the first
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1)
    values, places = lax.top_k(candidates.reshape(logits.shape[0], -1), count)
    return values, jnp.take_along_axis(chosen, places // BLOCK, axis=-1) * BLOCK + places % BLOCK


def _argmax(logits: Logits) -> Int32[Array, " row"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
