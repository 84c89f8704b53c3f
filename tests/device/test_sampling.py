"""Tokens are drawn from the distribution that a request asks for, by what is found in its definition."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.device.batch import (
    BIASES,
    CONSTRAINED,
    LEAST_TEMPERATURE,
    PENALIZES,
    SAMPLES,
    TOP_K,
    TOP_P,
    Upload,
)
from jaxserve.device.decode_state import DecodeState
from jaxserve.device.sampling import constrain_logits, cut_weights, draw_tokens, process_logits, weigh_tokens
from jaxserve.device.vocabulary import search_on

VOCAB = 300
DRAWS = 8_000
LOGITS = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32) * 2


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return weights / weights.sum()


def expected(
    logits: np.ndarray = LOGITS, temperature: float = 1.0, top_k: int = VOCAB, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Probabilities by sorting, in float64."""
    probabilities = softmax(logits, temperature)
    order = np.argsort(-probabilities)
    probabilities[order[top_k:]] = 0
    sums = np.cumsum(probabilities[order])
    probabilities[order[np.searchsorted(sums, top_p * sums[-1]) + 1 :]] = 0
    probabilities[probabilities < min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()


def chooser(platform: str, features: int) -> Callable[..., jax.Array]:
    """From logits, rows, the state, and of a constraint the tokens that it allows, to tokens."""
    search = search_on(platform)

    @jax.jit
    def choose(logits, rows, state, allowed):
        if features & (BIASES | PENALIZES):
            logits = process_logits(logits, rows, state)
        if features & CONSTRAINED:
            logits = constrain_logits(logits, rows, allowed, search)
        likeliest = search.argmax(logits)
        weights = weigh_tokens(logits, likeliest, rows)
        cuts = features & (TOP_K | TOP_P)
        thresholds = cut_weights(weights, rows, search, cuts) if cuts else jnp.zeros(len(logits))
        return draw_tokens(weights, thresholds, likeliest, rows)

    return choose


def drawn(
    features: int, allowed: np.ndarray | None = None, platform: str = "cpu", **fields: float | jax.Array
) -> np.ndarray:
    """Shares of the tokens that rows of the same logits and different seeds draw."""
    rows = Upload.unpack(jnp.zeros(Upload.size(DRAWS, 0, 1), jnp.int32), DRAWS, 0)
    fields = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0} | fields
    rows = replace(
        rows,
        features=jnp.full(DRAWS, features, jnp.int32),
        seed=jnp.arange(DRAWS, dtype=jnp.int32),
        length=jnp.full(DRAWS, 9, jnp.int32),
        stop_ids=jnp.full_like(rows.stop_ids, -1),
        **{name: jnp.full_like(getattr(rows, name), value) for name, value in fields.items()},
    )
    state = DecodeState.zeros(1, VOCAB)
    state = replace(
        state,
        output_counts=state.output_counts.at[0, :50].set(2),
        bias_ids=state.bias_ids.at[0].set(jnp.arange(state.bias_ids.shape[1]) % VOCAB),
        bias_values=state.bias_values.at[0, :5].set(3.0),
    )
    logits = jnp.broadcast_to(LOGITS, (DRAWS, VOCAB))
    masks = None if allowed is None else jnp.broadcast_to(allowed, (DRAWS, len(allowed)))
    tokens = chooser(platform, features)(logits, rows, state, masks)
    return np.bincount(tokens, minlength=VOCAB) / DRAWS


def assert_drawn_from(shares: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's test: a right draw fails once in 10,000 times, and of fixed seeds never. Rare tokens count together."""
    assert (shares[probabilities == 0] == 0).all()
    rare = probabilities * DRAWS < 10
    found = np.append(shares[~rare], shares[rare].sum())
    wanted = np.append(probabilities[~rare], probabilities[rare].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    assert len(found) > 3
    statistic = DRAWS * (np.square(found - wanted) / wanted).sum()
    freedom = len(found) - 1
    # Wilson and Hilferty: the cube root of a chi-squared number over its degrees of freedom is nearly normal.
    assert ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5 < 3.7


EVERYTHING = {"temperature": 1.5, "top_k": 40, "top_p": 0.7, "min_p": 0.02}


@pytest.mark.parametrize(
    ("platform", "fields"),
    [
        *(("cpu", fields) for fields in ({}, {"temperature": 0.4}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.05})),
        *((platform, EVERYTHING) for platform in ("cpu", "cuda", "tpu")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_tokens_are_drawn_as_often_as_they_are_likely(platform, fields):
    features = SAMPLES | (TOP_K if "top_k" in fields else 0) | (TOP_P if "top_p" in fields else 0)
    assert_drawn_from(drawn(features, platform=platform, **fields), expected(**fields))


@pytest.mark.parametrize(
    ("platform", "fields"),
    [
        *(("cpu", fields) for fields in ({}, {"min_p": 1.0}, {"min_p": 1.0, "top_k": 5}, {"top_p": 1e-6})),
        *((platform, {"min_p": 1.0, "top_p": 0.9}) for platform in ("cuda", "tpu")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_where_the_likeliest_token_alone_is_left_it_is_drawn_at_any_temperature(platform, fields):
    temperatures = (LEAST_TEMPERATURE, 1e-9, 1e-6) if not fields else (LEAST_TEMPERATURE, 1e-6, 0.3, 0.7, 0.9, 1.3, 99)
    features = SAMPLES | (TOP_K if "top_k" in fields else 0) | (TOP_P if "top_p" in fields else 0)
    shares = drawn(features, platform=platform, temperature=jnp.resize(jnp.array(temperatures), DRAWS), **fields)
    assert shares[LOGITS.argmax()] == 1.0


def test_a_penalty_changes_the_odds_of_what_was_said():
    fields = {"frequency_penalty": 0.5, "presence_penalty": 0.25, "repetition_penalty": 1.3}
    logits = LOGITS.copy()
    said = logits[:50]
    logits[:50] = np.where(said > 0, said / 1.3, said * 1.3) - 2 * 0.5 - 0.25
    assert_drawn_from(drawn(SAMPLES | PENALIZES, **fields), expected(logits))


def test_a_bias_changes_the_odds_of_its_tokens():
    logits = LOGITS.copy()
    logits[:5] += 3.0
    assert_drawn_from(drawn(SAMPLES | BIASES), expected(logits))


def test_what_a_constraint_leaves_is_drawn_as_often_as_it_is_likely_in_it():
    allowed = np.random.default_rng(1).random(VOCAB) < 0.1
    words = np.packbits(np.pad(allowed, (0, -VOCAB % 32)), bitorder="little").view("<i4")
    shares = drawn(SAMPLES | CONSTRAINED | TOP_K, words, top_k=12)
    assert_drawn_from(shares, expected(np.where(allowed, LOGITS, -np.inf), top_k=12))


def test_what_is_not_allowed_is_not_drawn_where_rounding_of_running_sums_leaves_a_gap_for_it():
    """Of the 2^24 numbers that a draw may take, those of these seeds at this position fall into such gaps."""
    random = np.random.default_rng(7)
    allowed = random.random(49_152) < 0.001
    weights = jnp.asarray(np.where(allowed, random.random(len(allowed)), 0), jnp.float32)
    seeds = jnp.asarray([5168952, 3429781, 12542764, 4780129], jnp.int32)
    rows = Upload.unpack(jnp.zeros(Upload.size(len(seeds), 0, 1), jnp.int32), len(seeds), 0)
    rows = replace(rows, features=jnp.full_like(seeds, SAMPLES), seed=seeds, length=jnp.full_like(seeds, 9))
    unused = jnp.zeros(len(seeds))
    tokens = jax.jit(draw_tokens)(
        jnp.broadcast_to(weights, (len(seeds), len(weights))), unused, unused.astype(int), rows
    )
    assert allowed[tokens].all()


def test_features_of_other_rows_change_no_token():
    rows = Upload.unpack(jnp.zeros(Upload.size(3, 0, 1), jnp.int32), 3, 0)
    asked = [0, SAMPLES, SAMPLES | TOP_P]
    rows = replace(
        rows,
        features=jnp.asarray(asked, jnp.int32),
        temperature=jnp.asarray([0.0, 0.8, 0.8]),
        top_p=jnp.asarray([1.0, 1.0, 0.5]),
        seed=jnp.asarray([1, 2, 3], jnp.int32),
    )
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(3, VOCAB)), jnp.float32)
    together = chooser("cpu", SAMPLES | TOP_P | TOP_K)(logits, rows, None, None)
    for row, features in enumerate(asked):
        alone = jax.tree.map(lambda leaf: leaf[row : row + 1], rows)  # noqa: B023
        assert chooser("cpu", features)(logits[row : row + 1], alone, None, None)[0] == together[row]
    assert together[0] == np.argmax(logits[0])
