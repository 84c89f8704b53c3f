"""Numerics of the device's attention over fresh random inputs, against float64 dense attention on the host."""

import functools
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "kernels"))

# Beside the tests, whose cases these are.
from paged_sequences import (  # pyright: ignore[reportMissingImports]
    PagedSequences,
    Shape,
    TokenRange,
    bits,
)

from gpu_checks.cases import Case, Options
from gpu_checks.chosen_attention import chosen_attention
from pallas_kernels import PagedAttention

CASES = {
    "d128 page16 kv8": Shape(q_heads=32, kv_heads=8, head_dim=128),
    "d64 page16 kv3": Shape(q_heads=9, kv_heads=3, head_dim=64),
    "d128 page64 kv1": Shape(q_heads=8, kv_heads=1, head_dim=128, page_size=64),
    "d96 page16 kv2": Shape(q_heads=14, kv_heads=2, head_dim=96),
    "d256 page64 kv4 softcap window": Shape(
        q_heads=8, kv_heads=4, head_dim=256, page_size=64, softcap=30.0, sliding_window=600
    ),
    "d64 page16 kv8 sinks window": Shape(q_heads=64, kv_heads=8, head_dim=64, sinks=True, sliding_window=128),
    "d128 page64 kv2 int8": Shape(q_heads=8, kv_heads=2, head_dim=128, page_size=64, kv_dtype="int8"),
    "d128 page64 kv4 float8": Shape(q_heads=16, kv_heads=4, head_dim=128, page_size=64, kv_dtype="float8_e4m3fn"),
}
REHEARSED = ("d64 page16 kv3", "d128 page64 kv2 int8")
LIMITS = {"bfloat16": 1e-2, "float32": 1e-5}
"""Of a token's error, by the dtype of queries and output."""
REPEATS = 30
"""Of each call: a race may show once in many."""
REPEAT_SECONDS = 3.0
"""For a call's repeats at most."""


@dataclass(frozen=True)
class Outcome:
    """What a case showed."""

    errors: dict[str, float]
    """The largest error of a token, by kind of call: see `token_error`."""
    same_bits: bool
    """A decode row gave alone what it gave beside others."""
    repeats: int
    """Calls made again from the same cache."""
    other_bits: int
    """Those among them that gave other bits, the chunk's included."""

    def passes(self, dtype: str) -> bool:
        """Whether nothing is wrong; an error that is no number is."""
        return self.same_bits and not self.other_bits and all(error < LIMITS[dtype] for error in self.errors.values())


def cases(options: Options) -> Iterator[Case]:
    """The error of each shape, and whether bits depend on a row's neighbours or on chance."""
    for name in REHEARSED if options.rehearse else CASES:
        yield name, functools.partial(_figures, name, 90 if options.rehearse else 1500)


def _figures(name: str, length: int) -> dict:
    shape, seed = CASES[name], secrets.randbits(31)
    attention = chosen_attention(shape.kv_dtype or shape.dtype, softcap=shape.softcap is not None, sinks=shape.sinks)
    outcome = check(attention, shape, length, seed)
    figures = {"attention": attention.name, "seed": seed, **vars(outcome)}
    return {"passed": outcome.passes(shape.dtype), "cases": {name: figures}}


def check(attention: PagedAttention, shape: Shape, length: int, seed: int) -> Outcome:
    """Prompts in one chunk, then decode rows beside another chunk, in pages that hold another's garbage."""
    case = PagedSequences(attention, shape, [length, length // 3, 1, length // 2], seed=seed)
    case.cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan if leaf.dtype != jnp.int8 else 99), case.cache)
    prompt = [TokenRange(0, 0, length - 1, 0), TokenRange(1, 0, length // 3 - 1, 1), TokenRange(3, 0, length // 4, 2)]
    mixed = [
        TokenRange(1, length // 3 - 1, length // 3, 0),
        TokenRange(0, length - 1, length, 2),
        TokenRange(2, 0, 1, 3),
        TokenRange(3, length // 4, length // 2, 1),
    ]
    errors, among, repeats = {}, [], []
    for what, call in (("chunk", prompt), ("mixed", mixed)):
        before = jax.tree.map(jnp.copy, case.cache)
        among = case.call(*call, rows=4)
        each = [token_error(out, case.dense(piece)) for out, piece in zip(among, call, strict=True)]
        errors[what] = float(np.max(each))  # unlike max(), of a NaN it makes one
        repeats += _repeated(case, before, call, among)
    (alone,) = case.call(TokenRange(0, length - 1, length, 0), rows=1)
    return Outcome(errors, bool((bits(among[1]) == bits(alone)).all()), len(repeats), repeats.count(False))


def _repeated(case: PagedSequences, before, call: Sequence[TokenRange], first: list[np.ndarray]) -> list[bool]:
    """Whether each of several equal calls from the cache `before` gave the bits of the first."""
    after, same = case.cache, []
    end = time.monotonic() + REPEAT_SECONDS
    while len(same) < REPEATS and time.monotonic() < end:
        case.cache = jax.tree.map(jnp.copy, before)  # the call is donated its cache
        again = case.call(*call, rows=4)
        same.append(all((bits(a) == bits(b)).all() for a, b in zip(first, again, strict=True)))
    case.cache = after
    return same


def token_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest norm of a token's difference, as a part of the norm of what was expected for it.

    Not of the largest number of all tokens: those late in a long context have small ones.
    """
    difference, norm = (
        np.linalg.norm(array.reshape(len(array), -1), axis=1) for array in (got.astype(np.float64) - expected, expected)
    )
    return float(np.max(difference / norm))
