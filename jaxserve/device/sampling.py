"""From logits to tokens: every parameter per row, everything on the device.

Order: logit bias, penalties, constraint, temperature, top-k, top-p, min-p, then one uniform number a row, from the
request's seed and the token's position, inverts the distribution. What no row of a step asks for is not in the programs
that it runs (`choosing`).
"""

import jax.numpy as jnp
from jax import lax
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.device.batch import BIASES, CONSTRAINED, PENALIZES, SAMPLES, TOP_K, TOP_P, Upload
from jaxserve.device.decode_state import DecodeState
from jaxserve.device.row_sums import row_sums
from jaxserve.device.thresholds import Thresholds, Weights
from jaxserve.device.vocabulary import Logits, VocabularySearch, at_tokens
from jaxserve.request import MAX_LOGPROBS

COLUMN = 128
"""Tokens that a draw takes together before it looks at each."""

Tokens = Int32[Array, " row"]


def process_logits(logits: Logits, rows: Upload, state: DecodeState) -> Logits:
    """With what each row asks for: no stop ids where it is too early for them, logit biases, penalties."""
    return _penalize(_add_bias(_mask_stop_ids(logits, rows), rows, state), rows, state)


def constrain_logits(
    logits: Logits, rows: Upload, allowed: Int32[Array, "row mask_word"], search: VocabularySearch
) -> Logits:
    """Takes from rows with a constraint what it does not allow: bit b of word w is token 32 w + b."""
    constrained = (rows.features & CONSTRAINED != 0)[:, None]
    return jnp.where(constrained & ~search.bits(allowed, logits.shape[1]), -jnp.inf, logits)


def _mask_stop_ids(logits: Logits, rows: Upload) -> Logits:
    vocab = logits.shape[-1]
    early = (rows.length < rows.min_length)[:, None]
    ids = jnp.where(early & (rows.stop_ids >= 0), rows.stop_ids, vocab)
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].set(-jnp.inf, mode="drop")


def _add_bias(logits: Logits, rows: Upload, state: DecodeState) -> Logits:
    vocab = logits.shape[-1]
    biased = (rows.features & BIASES != 0)[:, None]
    ids = jnp.where(biased, state.bias_ids.at[rows.slot].get(mode="clip"), vocab)
    values = state.bias_values.at[rows.slot].get(mode="clip")
    return logits.at[jnp.arange(logits.shape[0])[:, None], ids].add(values, mode="drop")


def _penalize(logits: Logits, rows: Upload, state: DecodeState) -> Logits:
    """Presence and frequency penalties on the output (as the OpenAI API), repetition on prompt and output (CTRL,
    arXiv:1909.05858)."""
    counts = state.output_counts.at[rows.slot].get(mode="clip")
    seen = state.in_prompt.at[rows.slot].get(mode="clip") | (counts > 0)
    penalty = rows.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    penalized = jnp.where(seen, repeated, logits)
    penalized -= rows.frequency_penalty[:, None] * counts + rows.presence_penalty[:, None] * (counts > 0)
    return jnp.where((rows.features & PENALIZES != 0)[:, None], penalized, logits)


def weigh_tokens(logits: Logits, likeliest: Tokens, rows: Upload) -> Weights:
    """Weights in proportion to the probabilities at each row's temperature, the likeliest token's 1."""
    # The difference first: it is 0 for the likeliest token, whatever the temperature and however quotients are rounded.
    below = logits - at_tokens(logits, likeliest)[:, None]
    return jnp.exp(below / jnp.where(_samples(rows), rows.temperature, 1.0)[:, None])


def _samples(rows: Upload) -> Bool[Array, " row"]:
    return rows.features & SAMPLES != 0


def cut_weights(weights: Weights, rows: Upload, search: VocabularySearch, features: int) -> Thresholds:
    """The smallest weight of each row within what of top-k and top-p is among the features. Ties at it are within."""
    vocab, samples = weights.shape[-1], _samples(rows)
    top_k = jnp.where(samples & (rows.top_k > 0), jnp.minimum(rows.top_k, vocab), vocab)
    top_p = jnp.where(samples, rows.top_p, 1.0)
    return search.thresholds(weights, top_k if features & TOP_K else None, top_p if features & TOP_P else None)


def draw_tokens(weights: Weights, thresholds: Thresholds, likeliest: Tokens, rows: Upload) -> Tokens:
    """The next token of each row: the likeliest, or if it samples one of those within its threshold and min-p."""
    samples = _samples(rows)
    # The likeliest token has weight 1.
    thresholds = jnp.maximum(thresholds, jnp.where(samples, rows.min_p, 0.0))
    return jnp.where(samples, _draw(weights, thresholds, rows), likeliest)


def _draw(weights: Weights, thresholds: Thresholds, rows: Upload) -> Tokens:
    """Inverts each row's distribution, of what reaches its threshold, at one uniform number.

    In an order that keeps the running sums short: the vocabulary in COLUMN rows of a table, column after column. Tokens
    of a column are no neighbours in memory, so that its sum takes whole registers on every platform.
    """

    def within(weights: Float[Array, "row ..."]) -> Float[Array, "row ..."]:
        return jnp.where(weights >= jnp.expand_dims(thresholds, range(1, weights.ndim)), weights, 0.0)

    table = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % COLUMN))).reshape(weights.shape[0], COLUMN, -1)
    columns = row_sums(table, within)
    sums = jnp.cumsum(columns, axis=-1)
    target = _uniform(rows.seed, rows.length) * sums[:, -1]
    column = _first_beyond(columns, sums, target)
    inside = within(jnp.take_along_axis(table, column[:, None, None], axis=2)[:, :, 0])
    before = jnp.where(column > 0, jnp.take_along_axis(sums, jnp.maximum(column - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    place = _first_beyond(inside, jnp.cumsum(inside, axis=-1), target - before)
    return (place * table.shape[2] + column).astype(jnp.int32)


def _first_beyond(
    weights: Float[Array, "row weighed"], sums: Float[Array, "row weighed"], target: Float[Array, " row"]
) -> Int32[Array, " row"]:
    """The first of each row's weights whose running sum is beyond the target, or the last: of those that are not 0.

    Running sums are made in parallel and rounded on different ways: they may rise, or fall, where a weight is 0.
    """
    # One pass finds both: places, and before any of them those beyond the target, the first of which ranks highest.
    places, width = jnp.arange(weights.shape[1]), weights.shape[1]
    ranks = jnp.where(sums > target[:, None], 2 * width - places, places)
    highest = jnp.max(jnp.where(weights > 0, ranks, 0), axis=-1)
    return jnp.where(highest > width, 2 * width - highest, highest)


def _uniform(seed: Int32[Array, " row"], position: Int32[Array, " row"]) -> Float[Array, " row"]:
    """One number in [0, 1) for each (seed, position): of the generator with the seed as its key, that of the position
    (Threefry-2x32, doi:10.1145/2063384.2063405)."""
    seed, position = (lax.bitcast_convert_type(each, jnp.uint32) for each in (seed, position))
    bits, _ = threefry2x32_p.bind(jnp.zeros_like(seed), seed, position, jnp.zeros_like(position))
    return (bits >> 8).astype(jnp.float32) * 2**-24


def token_logprobs(
    logits: Logits, likeliest: Tokens, tokens: Tokens, search: VocabularySearch
) -> tuple[Float[Array, "row reported"], Int32[Array, "row reported"]]:
    """Log-probabilities and ids of a token of each row and then of the likeliest, from raw logits."""
    best = at_tokens(logits, likeliest)
    total = best + jnp.log(row_sums(logits, lambda part: jnp.exp(part - best[:, None])))
    top, ids = search.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    values = jnp.concatenate([at_tokens(logits, tokens)[:, None], top], axis=-1) - total[:, None]
    return values, jnp.concatenate([tokens[:, None], ids], axis=-1)
