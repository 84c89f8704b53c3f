"""The second half of a step: from what the forward predicts to tokens.

It is a string of programs, of which a step runs those that its rows ask for, as the host knows before. None has a
branch: a GPU stops at one until the host has read which way to go, and so would the host, which has the next step to
prepare.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.device.batch import BIASES, EARLY, PENALIZES, TOP_K, TOP_P, Upload
from jaxserve.device.decode_state import DecodeState
from jaxserve.device.sampling import (
    constrain_logits,
    cut_weights,
    draw_tokens,
    process_logits,
    token_logprobs,
    weigh_tokens,
)
from jaxserve.device.step import Prediction
from jaxserve.device.thresholds import Thresholds, Weights
from jaxserve.device.vocabulary import VocabularySearch
from jaxserve.scheduling.sequence import EMITTED, FAILED, STOPPED

TokensAndFlags = Int32[Array, "2 row"]
"""The token of each row, then its flags (`sequence.EMITTED`, `STOPPED`, `FAILED`)."""
PackedRows = Int32[Array, " packed_rows"]
"""The rows' part of a step's upload."""

PROCESSED = EARLY | BIASES | PENALIZES
CUT = TOP_K | TOP_P
"""What of the features of a step makes it process logits, and cut what it draws from."""


@dataclass(frozen=True)
class ChoosingPrograms[Program]:
    """Those for a number of rows: functions, lowered or compiled.

    What one computes of a row does not depend on what others ask for, which decides only whether it runs: two programs
    of one formula may round differently.
    """

    process: Program
    """(prediction, state, packed rows) -> prediction, with biases, penalties and stop ids that it is too early for."""
    constrain: Program
    """(prediction, packed rows, allowed) -> prediction. `allowed` is what constraints leave of the vocabulary, int32
    [row, mask_word]: bit b of word w is token 32 w + b. Rows without a constraint do not look at it."""
    weigh: Program
    """(prediction, packed rows) -> weights [row, vocab] in proportion to the probabilities, the likeliest token's 1."""
    cut: dict[int, Program]
    """(weights, packed rows) -> threshold of each row's weights by top-k and top-p; 0 keeps all. By sets of features: a
    step takes the first that has what its rows ask for."""
    draw: Program
    """(state (DONATED), prediction, packed rows, weights, thresholds) -> (state, tokens and flags). Of a row that does
    not sample it takes the likeliest token. Decides which rows ended, and writes both back to the slots. The state must
    be the one that the forward saw."""
    take: Program
    """(state (DONATED), prediction, packed rows) -> the same, where no row samples."""
    count: Program
    """(state (DONATED), tokens and flags, packed rows) -> state, with the tokens of rows that have penalties."""
    report: Program
    """(the forward's prediction, tokens and flags) -> log-probabilities and tokens: the chosen, then the likeliest."""

    def __iter__(self) -> Iterator[Program]:
        yield from (self.process, self.constrain, self.weigh, *self.cut.values())
        yield from (self.draw, self.take, self.count, self.report)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def map[Other](self, change: Callable[[str, Program], Other]) -> "ChoosingPrograms[Other]":
        """The same of what is made of each program, of which the name is told."""
        return ChoosingPrograms(
            change("process", self.process),
            change("constrain", self.constrain),
            change("weigh", self.weigh),
            {features: change("cut", program) for features, program in self.cut.items()},
            change("draw", self.draw),
            change("take", self.take),
            change("count", self.count),
            change("report", self.report),
        )

    def cutting(self, features: int) -> Program:
        """The `cut` of a step whose rows together ask for these features."""
        wanted = features & CUT
        return next(program for having, program in self.cut.items() if having & wanted == wanted)


def make_choosing(search: VocabularySearch) -> ChoosingPrograms[Callable[..., Any]]:
    """The programs of a platform, to be compiled."""
    return ChoosingPrograms(
        partial(_process, search),
        partial(_constrain, search),
        _weigh,
        {features: partial(_cut, search, features) for features in search.cuts},
        _draw,
        _take,
        _count,
        partial(_report, search),
    )


def _process(search: VocabularySearch, prediction: Prediction, state: DecodeState, packed: PackedRows) -> Prediction:
    logits = process_logits(prediction.logits, _rows(packed, prediction), state)
    return replace(prediction, logits=logits, likeliest=search.argmax(logits))


def _constrain(
    search: VocabularySearch, prediction: Prediction, packed: PackedRows, allowed: Int32[Array, "row mask_word"]
) -> Prediction:
    logits = constrain_logits(prediction.logits, _rows(packed, prediction), allowed, search)
    return replace(prediction, logits=logits, likeliest=search.argmax(logits))


def _weigh(prediction: Prediction, packed: PackedRows) -> Weights:
    return weigh_tokens(prediction.logits, prediction.likeliest, _rows(packed, prediction))


def _cut(search: VocabularySearch, features: int, weights: Weights, packed: PackedRows) -> Thresholds:
    return cut_weights(weights, Upload.unpack(packed, len(weights), 0), search, features)


def _draw(
    state: DecodeState, prediction: Prediction, packed: PackedRows, weights: Weights, thresholds: Thresholds
) -> tuple[DecodeState, TokensAndFlags]:
    rows = _rows(packed, prediction)
    tokens = draw_tokens(weights, thresholds, prediction.likeliest, rows)
    return _write_back(state, tokens, prediction.failed, rows)


def _take(state: DecodeState, prediction: Prediction, packed: PackedRows) -> tuple[DecodeState, TokensAndFlags]:
    return _write_back(state, prediction.likeliest, prediction.failed, _rows(packed, prediction))


def _report(
    search: VocabularySearch, prediction: Prediction, chosen: TokensAndFlags
) -> tuple[Float[Array, "row reported"], Int32[Array, "row reported"]]:
    return token_logprobs(prediction.logits, prediction.likeliest, chosen[0], search)


def _rows(packed: PackedRows, prediction: Prediction) -> Upload:
    return Upload.unpack(packed, len(prediction.likeliest), 0)


def _write_back(
    state: DecodeState, tokens: Int32[Array, " row"], failed: Bool[Array, " row"], rows: Upload
) -> tuple[DecodeState, TokensAndFlags]:
    decodes = rows.decodes & ~state.ended.at[rows.slot].get(mode="clip")
    samples = decodes | (rows.sample_index >= 0)
    stopped = jnp.any(tokens[:, None] == rows.stop_ids, axis=-1)
    flags = jnp.where(samples, EMITTED + STOPPED * stopped + FAILED * failed, 0)
    ended = stopped | failed | (rows.length + 1 >= rows.max_length)
    slot = jnp.where(samples, rows.slot, state.ended.shape[0])
    last_token = state.last_token.at[slot].set(tokens, mode="drop")
    state = replace(state, last_token=last_token, ended=state.ended.at[slot].set(ended, mode="drop"))
    return state, jnp.stack([tokens, flags.astype(jnp.int32)])


def _count(state: DecodeState, chosen: TokensAndFlags, packed: PackedRows) -> DecodeState:
    tokens, flags = chosen
    rows = Upload.unpack(packed, len(tokens), 0)
    is_counted = (flags & EMITTED != 0) & (rows.features & PENALIZES != 0)
    slot = jnp.where(is_counted, rows.slot, state.ended.shape[0])
    return replace(state, output_counts=state.output_counts.at[slot, tokens].add(1, mode="drop"))
