"""Which tokens a step may choose for the requests that have a constraint.

A request's matcher has taken in exactly the tokens that were read, so it needs to know nothing of preemption, prefix
hits or a restart: it is where its sequence is. Masks are computed by llguidance outside the GIL, in parallel, while the
device computes the logits that they are for.
"""

import logging
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from jaxserve.core.messages import Submit
from jaxserve.events import FinishReason
from jaxserve.scheduling.sequence import COMPLETED, EMITTED, FAILED, STOPPED, StepPlan, StepResults

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

log = logging.getLogger(__name__)

MASK_SECONDS = 0.25
"""Processor time that one mask of one request may take; most take a tenth of a millisecond."""

Ending = tuple[int, FinishReason, str | None]
"""A request that can go no further: its handle, how it ends, and the error."""


@dataclass(slots=True)
class _Held:
    """A request that is held to a grammar."""

    submit: Submit
    matcher: "LLMatcher"
    never: list[int]
    """End-of-sequence ids that do not end the request, and so may not be chosen."""


class TokenMasks:
    """The matchers of the requests in the core, by handle.

    Args:
        vocab_size: of the model's logits.
        eos_ids: the model's end-of-sequence ids.
    """

    def __init__(self, vocab_size: int, eos_ids: Rows[int]):
        self._eos_ids = eos_ids
        self._words = -(-vocab_size // 32)
        self._held: dict[int, _Held] = {}
        self._is_slow = False
        """Whether some mask of the last step took so long that each is to be timed."""

    @cached_property
    def _executor(self) -> "LLExecutor | None":
        """Its threads; None where the system has none left, and masks are computed one after another."""
        from llguidance import LLExecutor  # not before a request needs it: a host may lack the package

        try:
            return LLExecutor()
        except ValueError as error:
            log.warning("constraints' masks are computed on one thread: %s", error)
            return None

    def start(self, submit: Submit, matcher: "LLMatcher") -> None:
        """Holds a request to a grammar, from its first token on."""
        never = [id for id in self._eos_ids if id not in submit.stop_ids]
        self._held[submit.handle] = _Held(submit, matcher, never)

    def forget(self, handle: int) -> None:
        """Lets go of a request that has ended; any other handle is a no-op."""
        self._held.pop(handle, None)

    def rows(self, plan: StepPlan) -> list[int]:
        """The rows of a step that choose a token and have a constraint."""
        if not self._held:
            return []
        return [
            row
            for row, sequence in enumerate(plan.sequences)
            if sequence.handle in self._held and (plan.decodes[row] or plan.sample_index[row] >= 0)
        ]

    def advance(self, plan: StepPlan, results: StepResults) -> list[Ending]:
        """Takes in the tokens that a step gave, before the scheduler does: marks in `results.flags` those after which
        nothing may follow."""
        endings: list[Ending] = []
        for row in self.rows(plan):
            flag, sequence = results.flags[row], plan.sequences[row]
            if sequence.done or not flag & EMITTED or flag & (STOPPED | FAILED):
                continue
            matcher = self._held[sequence.handle].matcher
            matcher.consume_token(results.tokens[row])
            if matcher.is_error():
                endings.append(_failure(sequence.handle, matcher))
            elif matcher.is_stopped():
                results.flags[row] |= COMPLETED
        return endings

    def fill(self, plan: StepPlan, rows: Rows[int]) -> tuple[np.ndarray, list[Ending]]:
        """The masks of a step, int32 [row, mask_word], as `ChoosingPrograms` has them, and who can go no further.

        Every token before those of this step must have been taken in.
        """
        masks = np.zeros((len(plan.sequences), self._words), np.int32)
        held = [(self._held[plan.sequences[row].handle], row) for row in rows if not plan.sequences[row].done]
        endings = self._compute(held, masks) if held else []
        for one, row in held:
            if one.matcher.is_error():
                endings.append(_failure(one.submit.handle, one.matcher))
                continue
            if one.never:
                _clear(masks[row], one.never)
            early = plan.ends[row] < one.submit.min_length
            if (one.never or early) and not _leaves_a_token(masks[row], one.submit.stop_ids if early else ()):
                # Nothing may follow but the end, which the request put off.
                endings.append((one.submit.handle, FinishReason.STOP, None))
        return masks, endings

    def _compute(self, held: Rows[tuple[_Held, int]], masks: np.ndarray) -> list[Ending]:
        if self._is_slow or self._executor is None:
            return self._compute_timed(held, masks)
        from llguidance.numpy import fill_next_token_bitmask_par

        began = time.monotonic()
        fill_next_token_bitmask_par(self._executor, [(one.matcher, row) for one, row in held], masks)
        self._is_slow = time.monotonic() - began > MASK_SECONDS
        return []

    def _compute_timed(self, held: Rows[tuple[_Held, int]], masks: np.ndarray) -> list[Ending]:
        """One after another, so that it is seen whose mask takes so long; that request ends."""
        from llguidance.numpy import fill_next_token_bitmask

        self._is_slow = False
        endings: list[Ending] = []
        for one, row in held:
            began = time.thread_time()
            fill_next_token_bitmask(one.matcher, masks, row)
            if time.thread_time() - began > MASK_SECONDS:
                self._is_slow = True
                error = f"the constraint is too complex: a mask took more than {MASK_SECONDS:g} s"
                endings.append((one.submit.handle, FinishReason.ERROR, error))
        return endings


def _failure(handle: int, matcher: "LLMatcher") -> Ending:
    error = matcher.get_error().partition("\n")[0]
    return handle, FinishReason.ERROR, f"the constraint cannot be followed further: {error}"


def _clear(mask: np.ndarray, ids: Rows[int]) -> None:
    for id in ids:
        mask.view(np.uint32)[id // 32] &= np.uint32(~(1 << id % 32) & 0xFFFFFFFF)


def _leaves_a_token(mask: np.ndarray, without: Rows[int]) -> bool:
    rest = mask.copy()
    _clear(rest, without)
    return bool(rest.any())
