"""Log-probabilities of prompt tokens, from what a mixed step computes anyway.

A step keeps the residual stream of its chunk; where a request asks, a program of its own makes logits of it, SCORED
positions at a time. So a step without such a request is the step that it was, and the vocabulary's logits are never
held for a whole chunk. The same lm head and the same sums as for generated tokens give the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from jaxserve.core.messages import TokenLogprobs
from jaxserve.device.sampling import token_logprobs
from jaxserve.device.step import Weights
from jaxserve.device.vocabulary import VocabularySearch
from jaxserve.models.llama import Llama
from jaxserve.scheduling.sequence import StepPlan
from pallas_kernels.linear import LiveRows

SCORED = 64
"""Positions whose logits are made together."""


def make_score(build_model: Callable[[Weights], Llama], search: VocabularySearch):
    """The program (weights, residual stream of a chunk, request) -> log-probabilities and ids, as `token_logprobs`.

    The request is an int32 vector: the index in the chunk of the first position, then for each of SCORED positions the
    token that follows it, -1 past their end.
    """

    def score(
        weights: Weights, hidden: Float[Array, "chunk hidden"], request: Int32[Array, " request"]
    ) -> tuple[Float[Array, "scored reported"], Int32[Array, "scored reported"]]:
        first, targets = request[0], request[1:]
        rows = hidden[jnp.minimum(first + jnp.arange(SCORED), hidden.shape[0] - 1)]
        count = jnp.sum(targets >= 0)
        live = LiveRows(jnp.stack([count, jnp.zeros_like(count)]).astype(jnp.int32), SCORED)
        logits = build_model(weights).logits(rows, live)
        return token_logprobs(logits, search.argmax(logits), jnp.maximum(targets, 0), search)

    return score


@dataclass(frozen=True)
class PendingScores:
    """Scores of consecutive prompt tokens of one row, on their way to the host."""

    row: int
    count: int
    values: jax.Array
    ids: jax.Array


class PromptScorer:
    """Runs the compiled programs, one for each chunk size.

    Args:
        programs: by chunk size.
        weights: of the model.
        whole: the sharding of what is whole on each of the devices.
    """

    def __init__(self, programs: dict[int, jax.stages.Compiled], weights: Weights, whole: jax.sharding.Sharding):
        self._programs = programs
        self._weights = weights
        self._whole = whole

    def warm_up(self, hidden: jax.Array) -> None:
        """Runs the program of a step's residual stream."""
        self._score(hidden, 0, [])

    def start(self, plan: StepPlan, hidden: jax.Array) -> list[PendingScores]:
        """Scores the pieces of a plan whose requests ask, behind its step; does not wait."""
        pending, offset = [], 0
        for piece in plan.pieces:
            for first in range(0, len(piece.targets), SCORED):
                targets = piece.targets[first : first + SCORED]
                values, ids = self._score(hidden, offset + first, targets)
                values.copy_to_host_async()
                ids.copy_to_host_async()
                pending.append(PendingScores(piece.row, len(targets), values, ids))
            offset += len(piece.token_ids)
        return pending

    def _score(self, hidden: jax.Array, first: int, targets: list[int]) -> tuple[jax.Array, jax.Array]:
        request = np.full(1 + SCORED, -1, np.int32)
        request[0] = first
        request[1 : 1 + len(targets)] = targets
        return self._programs[hidden.shape[0]](self._weights, hidden, jax.device_put(request, self._whole))


def read_scores(plan: StepPlan, pending: list[PendingScores]) -> dict[int, list[TokenLogprobs]]:
    """Waits for scores and gives them by row."""
    scores: dict[int, list[TokenLogprobs]] = {}
    for part in pending:
        top = plan.sequences[part.row].submit.prompt_logprobs + 1
        values, ids = jax.device_get((part.values, part.ids))
        scores.setdefault(part.row, []).extend(
            logprobs_of(ids_of, values_of, top)
            for ids_of, values_of in zip(ids[: part.count].tolist(), values[: part.count].tolist(), strict=True)
        )
    return scores


def logprobs_of(ids: list[int], values: list[float], top: int) -> TokenLogprobs:
    """One token's, from a line of `token_logprobs`: the token itself, and the likeliest before index `top`."""
    return ids[0], values[0], list(zip(ids[1:top], values[1:top], strict=True))
