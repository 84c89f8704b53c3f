"""Numerics of the device's attention over fresh random inputs, against float64 dense attention on the host."""

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "kernels"))

# Beside the tests, whose cases these are.
from paged_sequences import (  # pyright: ignore[reportMissingImports]
    PagedSequences,
    Shape,
    TokenRange,
    bits,
    relative_error,
)

from pallas_kernels import AttentionNeeds, select

CASES = {
    "d64 page16 kv3": Shape(q_heads=9, kv_heads=3, head_dim=64),
    "d128 page16 kv8": Shape(q_heads=32, kv_heads=8, head_dim=128),
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
LIMIT = 1e-2


def run(rehearse: bool) -> Iterator[dict]:
    """The largest relative error of each case, and whether a decode row's bits depend on its neighbours."""
    device = jax.devices()[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    length, seed = (90 if rehearse else 1500), secrets.randbits(31)
    results: dict = {"seed": seed, "passed": True, "largest_error": 0.0, "cases": {}}
    for name in REHEARSED if rehearse else CASES:
        shape = CASES[name]
        needs = AttentionNeeds(
            shape.kv_dtype or shape.dtype, shape.softcap is not None, shape.sinks, device_kind=device.device_kind
        )
        attention = select(platform, None, needs)
        errors, same = check(attention, shape, length, seed)
        results["cases"][name] = {"attention": attention.name, "errors": errors, "same_bits": same}
        results["largest_error"] = max(results["largest_error"], *errors.values())
        results["passed"] &= same and all(error < LIMIT for error in errors.values())
        yield results


def check(attention, shape: Shape, length: int, seed: int) -> tuple[dict[str, float], bool]:
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
    errors = {}
    for what, call in (("chunk", prompt), ("mixed", mixed)):
        got = case.call(*call, rows=4)
        errors[what] = max(relative_error(out, case.dense(piece)) for out, piece in zip(got, call, strict=True))
    among = got[1]
    (alone,) = case.call(TokenRange(0, length - 1, length, 0), rows=1)
    return errors, bool((bits(among) == bits(alone)).all())
