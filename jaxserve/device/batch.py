"""From a plan to arrays of fixed shape: one packed upload a step.

A step of R rows and C chunk tokens is told everything by one int32 vector: R rows of `ROW_COLUMNS + max_pages` (where
the row's token comes from, its limits, its sampling parameters, its page table), then C tokens, their rows and their
positions. Floats travel as their bits. `Upload.unpack` is the inverse, traced into the step.
"""

from dataclasses import dataclass
from enum import IntEnum

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.core.messages import Submit
from jaxserve.device.pytree import pytree_dataclass
from jaxserve.request import MAX_STOP_TOKEN_IDS
from jaxserve.scheduling.sequence import Sequence, StepPlan


class Column(IntEnum):
    """Columns of a row before its page table, by the names of `Upload`'s fields."""

    SLOT = 0
    DECODES = 1
    SAMPLE_INDEX = 2
    LENGTH = 3
    MAX_LENGTH = 4
    MIN_LENGTH = 5
    FEATURES = 6
    SEED = 7
    TOP_K = 8
    TEMPERATURE = 9
    TOP_P = 10
    MIN_P = 11
    PRESENCE_PENALTY = 12
    FREQUENCY_PENALTY = 13
    REPETITION_PENALTY = 14
    STOP_IDS = 15


REALS = range(Column.TEMPERATURE, Column.STOP_IDS)
"""Columns of floats."""
ROW_COLUMNS = Column.STOP_IDS + MAX_STOP_TOKEN_IDS
SAMPLES, TOP_K, TOP_P, PENALIZES, BIASES, EARLY, REPORTS_LOGPROBS, CONSTRAINED = (1 << bit for bit in range(8))
"""Bits of FEATURES: what a row needs beyond the argmax. A feature that no row has costs nothing in a step. EARLY is not
the row's: it is so in steps in which its sequence may not stop yet."""


LEAST_TEMPERATURE = 1e-30
"""Below it a row is greedy: the quotients would be no numbers."""


def features_of(submit: Submit) -> int:
    """The bits of FEATURES for a request."""
    penalizes = submit.presence_penalty or submit.frequency_penalty or submit.repetition_penalty != 1.0
    samples = submit.temperature >= LEAST_TEMPERATURE
    return (
        (SAMPLES if samples else 0)
        | (TOP_K if samples and submit.top_k > 0 else 0)
        | (TOP_P if samples and submit.top_p < 1.0 else 0)
        | (PENALIZES if penalizes else 0)
        | (BIASES if submit.logit_bias else 0)
        | (REPORTS_LOGPROBS if submit.logprobs >= 0 else 0)
        | (CONSTRAINED if submit.grammar is not None else 0)
    )


@pytree_dataclass
@dataclass(frozen=True)
class Upload:
    """A step's input, on the device. A row without a sequence has `slot` past the end: its writes are dropped."""

    slot: Int32[Array, " row"]
    decodes: Bool[Array, " row"]
    sample_index: Int32[Array, " row"]
    """Index in the chunk of the token whose logits the row samples from; -1 if it decodes or does not sample."""
    length: Int32[Array, " row"]
    """Tokens of the sequence that are computed once the step is done: the position of the token that it may give."""
    max_length: Int32[Array, " row"]
    min_length: Int32[Array, " row"]
    features: Int32[Array, " row"]
    seed: Int32[Array, " row"]
    top_k: Int32[Array, " row"]
    temperature: Float[Array, " row"]
    top_p: Float[Array, " row"]
    min_p: Float[Array, " row"]
    presence_penalty: Float[Array, " row"]
    frequency_penalty: Float[Array, " row"]
    repetition_penalty: Float[Array, " row"]
    stop_ids: Int32[Array, "row stop"]
    page_table: Int32[Array, "row max_pages"]
    chunk_tokens: Int32[Array, " chunk"]
    chunk_rows: Int32[Array, " chunk"]
    """-1 where the chunk has no token."""
    chunk_positions: Int32[Array, " chunk"]

    @staticmethod
    def size(rows: int, chunk: int, max_pages: int) -> int:
        """Length of the packed vector."""
        return rows * (ROW_COLUMNS + max_pages) + 3 * chunk

    @staticmethod
    def unpack(packed: Int32[Array, " packed"], rows: int, chunk: int) -> "Upload":
        """The fields of a packed vector."""
        table = packed[: packed.shape[0] - 3 * chunk].reshape(rows, -1)
        tokens, token_rows, positions = packed[packed.shape[0] - 3 * chunk :].reshape(3, chunk)

        def values(column: Column) -> Array:
            bits = table[:, column]
            return lax.bitcast_convert_type(bits, jnp.float32) if column in REALS else bits

        fields = {column.name.lower(): values(column) for column in Column}
        fields["decodes"] = fields["decodes"] != 0
        fields["stop_ids"] = table[:, Column.STOP_IDS : ROW_COLUMNS]
        return Upload(
            **fields,
            page_table=table[:, ROW_COLUMNS:],
            chunk_tokens=tokens,
            chunk_rows=token_rows,
            chunk_positions=positions,
        )


class Packer:
    """Keeps a line for each slot and copies those of a plan into a fresh upload.

    A vector handed to the device is never written again: the device may read it in place.
    """

    def __init__(self, slots: int, max_pages: int):
        self._slots = slots
        self._lines = np.zeros((slots, ROW_COLUMNS + max_pages), np.int32)
        self._reals = self._lines.view(np.float32)
        self._pages_written = np.zeros(slots, np.int64)

    def pack(self, plan: StepPlan, rows: int, chunk: int) -> np.ndarray:
        """The int32 upload of a plan for a step of `rows` rows and `chunk` chunk tokens."""
        for slot, sequence in plan.grown:
            self._write_new_pages(slot, sequence)
        for slot, sequence in plan.new_owners:
            self._own(slot, sequence)
        width = self._lines.shape[1]
        packed = np.zeros(rows * width + 3 * chunk, np.int32)
        table = packed[: rows * width].reshape(rows, width)
        count, slots = len(plan.slots), np.array(plan.slots, np.intp)
        # Page tables are wide and mostly empty: only what is in use is copied.
        used = ROW_COLUMNS + self._pages_written[slots].max(initial=0)
        table[:count, :used] = self._lines[slots, :used]
        table[:count, Column.SLOT] = slots
        table[:count, Column.LENGTH] = plan.ends
        table[:count, Column.DECODES] = 1
        table[:, Column.SAMPLE_INDEX] = -1
        if plan.pieces:
            table[:count, Column.DECODES] = plan.decodes
            table[:count, Column.SAMPLE_INDEX] = plan.sample_index
        table[count:, Column.SLOT] = self._slots
        tokens, token_rows, positions = packed[rows * width :].reshape(3, chunk)
        start = 0
        for piece in plan.pieces:
            end = start + len(piece.token_ids)
            tokens[start:end] = piece.token_ids
            token_rows[start:end] = piece.row
            positions[start:end] = np.arange(piece.start, piece.start + end - start)
            start = end
        token_rows[start:] = -1
        return packed

    def features(self, packed: np.ndarray, rows: int) -> int:
        """What those rows of an upload ask for together that choose a token in its step."""
        table = packed[: rows * self._lines.shape[1]].reshape(rows, -1)
        choosing = table[(table[:, Column.DECODES] != 0) | (table[:, Column.SAMPLE_INDEX] >= 0), :ROW_COLUMNS]
        is_early = (choosing[:, Column.LENGTH] < choosing[:, Column.MIN_LENGTH]).any()
        return int(np.bitwise_or.reduce(choosing[:, Column.FEATURES], initial=0)) | (EARLY if is_early else 0)

    def _write_new_pages(self, slot: int, sequence: Sequence) -> None:
        written, pages = self._pages_written[slot], sequence.pages
        self._lines[slot, ROW_COLUMNS + written : ROW_COLUMNS + len(pages)] = pages[written:]
        self._pages_written[slot] = len(pages)

    def _own(self, slot: int, sequence: Sequence) -> None:
        """Fills a slot's line for its new owner."""
        submit = sequence.submit
        line, reals = self._lines[slot], self._reals[slot]
        line[:] = 0
        self._pages_written[slot] = 0
        line[Column.MAX_LENGTH] = submit.max_length
        line[Column.MIN_LENGTH] = submit.min_length
        line[Column.FEATURES] = features_of(submit)
        line[Column.SEED] = np.uint32(submit.seed).view(np.int32)
        line[Column.TOP_K] = submit.top_k
        reals[Column.TEMPERATURE] = submit.temperature
        reals[Column.TOP_P] = submit.top_p
        reals[Column.MIN_P] = submit.min_p
        reals[Column.PRESENCE_PENALTY] = submit.presence_penalty
        reals[Column.FREQUENCY_PENALTY] = submit.frequency_penalty
        reals[Column.REPETITION_PENALTY] = submit.repetition_penalty
        line[Column.STOP_IDS : ROW_COLUMNS] = -1
        line[Column.STOP_IDS : Column.STOP_IDS + len(submit.stop_ids)] = submit.stop_ids
        self._write_new_pages(slot, sequence)
