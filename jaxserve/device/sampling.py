"""From logits to tokens: every parameter per row, everything on the device.

Order: logit bias, penalties, constraint, temperature, top-k, top-p, min-p, then one uniform number a row, from a key
folded from the request's seed and the token's position, inverts the distribution. A step in which no row needs a
feature skips it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.device.batch import BIASES, CONSTRAINED, FILTERS, PENALIZES, REPORTS_LOGPROBS, SAMPLES, Upload
from jaxserve.device.decode_state import DecodeState
from jaxserve.device.row_sums import row_sums
from jaxserve.device.vocabulary import Logits, VocabularySearch
from jaxserve.request import MAX_LOGPROBS

COLUMN = 128
"""Tokens that a draw takes together before it looks at each."""


def any_row(rows: Upload, feature: int) -> Bool[Array, ""]:
    """Whether a row asks for a feature (a bit of `Upload.features`)."""
    return jnp.any(rows.features & feature != 0)


def sample_tokens(
    logits: Logits,
    rows: Upload,
    state: DecodeState,
    allowed: Int32[Array, "row mask_word"],
    search: VocabularySearch,
) -> Int32[Array, " row"]:
    """The next token of each row.

    Args:
        logits: float32, raw.
        rows: the step's upload.
        state: penalty counts and logit biases, by slot.
        allowed: the tokens that a row with a constraint may take: bit b of word w is token 32 w + b.
        search: of the platform.
    """

    def likeliest(logits: Logits, rows: Upload, state: DecodeState, allowed: Array) -> Int32[Array, " row"]:
        return search.argmax(logits)

    def likeliest_allowed(logits: Logits, rows: Upload, state: DecodeState, allowed: Array) -> Int32[Array, " row"]:
        return search.argmax(_mask(logits, rows, allowed, search))

    def processed(logits: Logits, rows: Upload, state: DecodeState, allowed: Array) -> Int32[Array, " row"]:
        return _choose(_process(logits, rows, state), rows, search)

    def processed_allowed(logits: Logits, rows: Upload, state: DecodeState, allowed: Array) -> Int32[Array, " row"]:
        return _choose(_mask(_process(logits, rows, state), rows, allowed, search), rows, search)

    processes = _changes_logits(rows) | any_row(rows, SAMPLES)
    branches = (likeliest, likeliest_allowed, processed, processed_allowed)
    return lax.switch(2 * processes + any_row(rows, CONSTRAINED), branches, logits, rows, state, allowed)


def _is_early(rows: Upload) -> Bool[Array, " row"]:
    """Whether a row's sequence may not stop yet."""
    return rows.length < rows.min_length


def _changes_logits(rows: Upload) -> Bool[Array, ""]:
    return any_row(rows, BIASES | PENALIZES) | jnp.any(_is_early(rows))


def _process(logits: Logits, rows: Upload, state: DecodeState) -> Logits:
    # A feature that no row asks for costs a copy of the logits here; where none is asked for, all of them cost one.
    return lax.cond(_changes_logits(rows), _process_each, lambda logits, *_: logits, logits, rows, state)


def _process_each(logits: Logits, rows: Upload, state: DecodeState) -> Logits:
    logits = lax.cond(jnp.any(_is_early(rows)), _mask_stop_ids, lambda x, *_: x, logits, rows)
    logits = lax.cond(any_row(rows, BIASES), _add_bias, lambda x, *_: x, logits, rows, state)
    return lax.cond(any_row(rows, PENALIZES), _penalize, lambda x, *_: x, logits, rows, state)


def _choose(logits: Logits, rows: Upload, search: VocabularySearch) -> Int32[Array, " row"]:
    draw = partial(_draw_or_argmax, search=search)
    return lax.cond(any_row(rows, SAMPLES), draw, lambda x, _: search.argmax(x), logits, rows)


def _mask(logits: Logits, rows: Upload, allowed: Int32[Array, "row mask_word"], search: VocabularySearch) -> Logits:
    """Takes from rows with a constraint what it does not allow."""
    constrained = (rows.features & CONSTRAINED != 0)[:, None]
    return jnp.where(constrained & ~search.bits(allowed, logits.shape[1]), -jnp.inf, logits)


def _mask_stop_ids(logits: Logits, rows: Upload) -> Logits:
    vocab = logits.shape[-1]
    early = _is_early(rows)[:, None] & (rows.stop_ids >= 0)
    ids = jnp.where(early, rows.stop_ids, vocab)
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


def _draw_or_argmax(logits: Logits, rows: Upload, search: VocabularySearch) -> Int32[Array, " row"]:
    samples = rows.features & SAMPLES != 0
    scaled = logits / jnp.where(samples, rows.temperature, 1.0)[:, None]
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
    thresholds = lax.cond(
        any_row(rows, FILTERS),
        partial(_thresholds, search=search),
        lambda *_: jnp.zeros_like(rows.min_p),
        weights,
        rows,
    )
    return jnp.where(samples, _draw(weights, thresholds, rows), search.argmax(logits))


def _thresholds(weights: Logits, rows: Upload, search: VocabularySearch) -> Float[Array, " row"]:
    """The smallest weight of each row within top-k, top-p and min-p. Ties at it are all within."""
    vocab = weights.shape[-1]
    filters = rows.features & FILTERS != 0
    top_k = jnp.where(filters & (rows.top_k > 0), jnp.minimum(rows.top_k, vocab), vocab)
    thresholds = search.thresholds(weights, top_k, jnp.where(filters, rows.top_p, 1.0))
    # The likeliest token has weight 1.
    return jnp.maximum(thresholds, jnp.where(filters, rows.min_p, 0.0))


def _draw(weights: Logits, thresholds: Float[Array, " row"], rows: Upload) -> Int32[Array, " row"]:
    """Inverts each row's distribution, of what reaches its threshold, at one uniform number.

    In an order that keeps the running sums short: the vocabulary in COLUMN rows of a table, column after column. Tokens
    of a column are no neighbours in memory, so that its sum takes whole registers on every platform.
    """

    def within(weights: Float[Array, "row ..."]) -> Float[Array, "row ..."]:
        return jnp.where(weights >= jnp.expand_dims(thresholds, range(1, weights.ndim)), weights, 0.0)

    table = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % COLUMN))).reshape(weights.shape[0], COLUMN, -1)
    sums = jnp.cumsum(row_sums(table, within), axis=-1)
    # Just under 1, so that rounding cannot carry the target past the last token.
    target = _uniform(rows.seed, rows.length) * (1 - 2**-20) * sums[:, -1]
    column = jnp.minimum(jnp.sum(sums <= target[:, None], axis=-1), sums.shape[1] - 1)
    inside = within(jnp.take_along_axis(table, column[:, None, None], axis=2)[:, :, 0])
    before = jnp.where(column > 0, jnp.take_along_axis(sums, jnp.maximum(column - 1, 0)[:, None], axis=1)[:, 0], 0.0)
    place = jnp.sum(jnp.cumsum(inside, axis=-1) <= (target - before)[:, None], axis=-1)
    last = jnp.max(jnp.where(inside > 0, jnp.arange(COLUMN), 0), axis=-1)
    return (jnp.minimum(place, last) * table.shape[2] + column).astype(jnp.int32)


def _uniform(seed: Int32[Array, " row"], position: Int32[Array, " row"]) -> Float[Array, " row"]:
    """One number in [0, 1) for each (seed, position)."""

    def one(seed: Array, position: Array) -> Array:
        key = jax.random.key(lax.bitcast_convert_type(seed, jnp.uint32), impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(one)(seed, position)


def token_logprobs(
    logits: Logits, tokens: Int32[Array, " row"], search: VocabularySearch
) -> tuple[Float[Array, "row reported"], Int32[Array, "row reported"]]:
    """Log-probabilities and ids of a token of each row and then of the likeliest, from raw logits."""
    best = jnp.max(logits, axis=-1)
    total = best + jnp.log(row_sums(logits, lambda part: jnp.exp(part - best[:, None])))
    top, ids = search.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
    values = jnp.concatenate([chosen, top], axis=-1) - total[:, None]
    return values, jnp.concatenate([tokens[:, None], ids], axis=-1)


def report_logprobs(
    logits: Logits, tokens: Int32[Array, " row"], rows: Upload, search: VocabularySearch
) -> tuple[Float[Array, "row reported"], Int32[Array, "row reported"]]:
    """`token_logprobs` of the chosen tokens; zeros if no row asks."""

    def skip(logits: Logits, tokens: Array) -> tuple[Array, Array]:
        shape = (logits.shape[0], 1 + min(MAX_LOGPROBS, logits.shape[-1]))
        return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)

    report = partial(token_logprobs, search=search)
    return lax.cond(any_row(rows, REPORTS_LOGPROBS), report, skip, logits, tokens)
