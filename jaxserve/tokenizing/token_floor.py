"""A lower bound of a text's tokens, from a count of its bytes: for refusing what cannot fit before tokenizing it."""

import string
from collections.abc import Sequence

import numpy as np

_KINDS = (b" \t\n\r\v\f", string.ascii_letters.encode(), string.digits.encode(), bytes(range(128, 256)))
"""Bytes that tend to share tokens: a vocabulary may have one token for eighty spaces, and no number above 9. What is
in none of them is a kind as well."""


def _kind_by_byte() -> np.ndarray:
    kinds = np.full(256, len(_KINDS), np.uint8)
    for kind, members in enumerate(_KINDS):
        kinds[list(members)] = kind
    return kinds


class TokenFloor:
    """The bound of one vocabulary."""

    def __init__(self, tokens: Sequence[bytes]):
        """`tokens` are the bytes of every token, at least one of which is not empty."""
        self._kind_by_byte = _kind_by_byte()
        ends = np.cumsum([len(token) for token in tokens])
        kinds = self._kinds(b"".join(tokens))
        most = []
        for kind in range(len(_KINDS) + 1):
            until = np.cumsum(kinds == kind)[ends[ends > 0] - 1]
            most.append(np.diff(until, prepend=0).max())
        # Bytes of a kind that no token has are dropped.
        self._most = np.where(np.array(most) == 0, np.iinfo(np.int64).max, most)

    def least_tokens(self, data: bytes) -> int:
        """No fewer tokens hold these bytes."""
        counts = np.bincount(self._kinds(data), minlength=len(_KINDS) + 1)
        return int((-(-counts // self._most)).max())

    def _kinds(self, data: bytes) -> np.ndarray:
        return self._kind_by_byte[np.frombuffer(data, np.uint8)]
