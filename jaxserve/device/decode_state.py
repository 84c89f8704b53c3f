"""What a slot remembers between steps, on the device. All else reaches a step as data from the host."""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.device.pytree import pytree_dataclass
from jaxserve.request import MAX_LOGIT_BIAS


@pytree_dataclass
@dataclass(frozen=True)
class DecodeState:
    """One row a slot. Donated to each step."""

    last_token: Int32[Array, " slot"]
    """The token that the slot's next decode step processes."""
    ended: Bool[Array, " slot"]
    """The slot's sequence has ended; its rows are masked until a new owner samples its first token."""
    output_counts: Int32[Array, "slot vocab"]
    """How often the sequence generated each token; kept for sequences with penalties."""
    in_prompt: Bool[Array, "slot vocab"]
    """Whether the prompt has the token; kept for sequences with penalties."""
    bias_ids: Int32[Array, "slot bias"]
    """Tokens with a logit bias; past the end of the vocabulary where unused."""
    bias_values: Float[Array, "slot bias"]

    @staticmethod
    def zeros(slots: int, vocab_size: int) -> "DecodeState":
        """A state in which every slot has ended."""
        return DecodeState(
            last_token=jnp.zeros(slots, jnp.int32),
            ended=jnp.ones(slots, bool),
            output_counts=jnp.zeros((slots, vocab_size), jnp.int32),
            in_prompt=jnp.zeros((slots, vocab_size), bool),
            bias_ids=jnp.full((slots, MAX_LOGIT_BIAS), vocab_size, jnp.int32),
            bias_values=jnp.zeros((slots, MAX_LOGIT_BIAS), jnp.float32),
        )


def take_slot(
    state: DecodeState,
    slot: Int32[Array, ""],
    prompt: Int32[Array, " context"],
    output: Int32[Array, " context"],
    bias_ids: Int32[Array, " bias"],
    bias_values: Float[Array, " bias"],
) -> DecodeState:
    """Gives a slot to a sequence with penalties or a logit bias. DONATES state.

    `prompt` and `output` hold token ids, past the end of the vocabulary where unused; `output` is not empty for a
    sequence that was preempted.
    """
    return replace(
        state,
        output_counts=state.output_counts.at[slot].set(0).at[slot, output].add(1, mode="drop"),
        in_prompt=state.in_prompt.at[slot].set(False).at[slot, prompt].set(True, mode="drop"),
        bias_ids=state.bias_ids.at[slot].set(bias_ids),
        bias_values=state.bias_values.at[slot].set(bias_values),
    )
