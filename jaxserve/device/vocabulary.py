"""Looking through the vocabulary, row by row, in the way that is best on each platform."""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.device.batch import TOP_K, TOP_P
from jaxserve.device.thresholds import FindThresholds, xla_thresholds
from pallas_kernels import native_build
from pallas_kernels.sampling_thresholds import sampling_thresholds

BLOCK = 128
"""Tokens that are looked at together before the whole is."""

LANES = 128
"""Of a TPU's register."""

Logits = Float[Array, "row vocab"]
MaskWords = Int32[Array, "row mask_word"]


@dataclass(frozen=True)
class VocabularySearch:
    """What is looked for in the rows of a step. Platforms differ in the order of a sum, and in nothing else."""

    argmax: Callable[[Logits], Int32[Array, " row"]]
    """The first of each row's largest."""
    top_k: Callable[[Logits, int], tuple[Float[Array, "row top"], Int32[Array, "row top"]]]
    """As `lax.top_k`: values, falling, and their tokens, of equals the first."""
    bits: Callable[[MaskWords, int], Bool[Array, "row vocab"]]
    """Of each token, from words of 32: bit b of word w is token 32 w + b. The vocabulary's size is given."""
    thresholds: FindThresholds
    """Where top-k and top-p cut."""
    cuts: tuple[int, ...]
    """The sets of features, of TOP_K and TOP_P, that there is a program for. More of them, and a step looks for less
    that its rows do not ask for; fewer, and an engine is compiled sooner."""


def search_on(platform: str) -> VocabularySearch:
    """That of a platform, which is given and not asked of JAX: steps are compiled for others too.

    XLA looks through whole rows slowly where it has no instruction for it: on a CPU for a maximum, on GPUs, where it
    sorts them, for the largest few. On a TPU what spreads numbers over the lanes of a register is a product. The native
    kernel for thresholds passes over rows that do not ask for one.
    """
    both = TOP_P | TOP_K
    if platform == "cpu" and native_build.available():
        return VocabularySearch(block_argmax, block_top_k, bits, sampling_thresholds, (both,))
    if platform == "cpu":
        return VocabularySearch(block_argmax, block_top_k, bits, xla_thresholds, (TOP_P, both))
    if platform == "cuda":
        return VocabularySearch(_argmax, block_top_k, bits, xla_thresholds, (TOP_P, both))
    return VocabularySearch(_argmax, lax.top_k, bits_by_product, xla_thresholds, (TOP_P, both))


def at_tokens(values: Logits, tokens: Int32[Array, " row"]) -> Float[Array, " row"]:
    """The value of a token of each row."""
    return jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]


def _in_blocks(values: Logits) -> Float[Array, "row vocab_block block"]:
    """Each row cut into blocks, the last one filled up."""
    padded = jnp.pad(values, ((0, 0), (0, -values.shape[-1] % BLOCK)), constant_values=-jnp.inf)
    return padded.reshape(values.shape[0], -1, BLOCK)


def block_argmax(logits: Logits) -> Int32[Array, " row"]:
    """The best block, then the best in it: one pass, which vectorizes."""
    blocks = _in_blocks(logits)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    best = jnp.argmax(jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], axis=-1)
    return (block * BLOCK + best).astype(jnp.int32)


def block_top_k(logits: Logits, count: int) -> tuple[Float[Array, "row top"], Int32[Array, "row top"]]:
    """Of the blocks with the largest maxima: no other can have one of the largest."""
    blocks = _in_blocks(logits)
    _, chosen = lax.top_k(jnp.max(blocks, axis=-1), min(count, blocks.shape[1]))
    chosen = jnp.sort(chosen, axis=-1)  # of equals, the first
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1)
    values, places = lax.top_k(candidates.reshape(logits.shape[0], -1), count)
    return values, jnp.take_along_axis(chosen, places // BLOCK, axis=-1) * BLOCK + places % BLOCK


def _argmax(logits: Logits) -> Int32[Array, " row"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def bits(words: MaskWords, vocab: int) -> Bool[Array, "row vocab"]:
    """By shifting each word to each of its bits."""
    shifted = words[:, :, None] >> jnp.arange(32)
    return (shifted & 1).reshape(words.shape[0], -1)[:, :vocab] != 0


def bits_by_product(words: MaskWords, vocab: int) -> Bool[Array, "row vocab"]:
    """Each byte goes to its eight tokens by a product with ones and zeros, which is exact in bfloat16."""
    byte_of = jnp.arange(LANES) // 8
    padded = jnp.pad(words, ((0, 0), (0, -words.shape[1] % (LANES // 32))))
    in_bytes = lax.bitcast_convert_type(padded, jnp.uint8).reshape(words.shape[0], -1, LANES // 8)
    spread = (byte_of == jnp.arange(LANES // 8)[:, None]).astype(jnp.bfloat16)
    of_token = jnp.matmul(in_bytes.astype(jnp.bfloat16), spread, preferred_element_type=jnp.float32)
    of_bit = of_token.astype(jnp.int32) >> (jnp.arange(LANES) % 8)
    return (of_bit & 1).reshape(words.shape[0], -1)[:, :vocab] != 0
