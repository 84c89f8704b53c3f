"""The step: (params, cache, state, upload) -> (cache, state, output). Pure, of fixed shape, the same on every platform.

A decode step has R rows; a mixed step has C chunk tokens beside them. Rows do not mix, so a row's result depends on its
own sequence alone.

It is two programs, `forward` and `choose`, each dispatched without waiting for the other. What a row with a constraint
may choose follows from its last token: the host reads that and finds it out while the forward runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from jaxserve.device.batch import PENALIZES, Upload
from jaxserve.device.decode_state import DecodeState
from jaxserve.device.kv_cache import KVCache
from jaxserve.device.pytree import pytree_dataclass
from jaxserve.device.sampling import report_logprobs, sample_tokens
from jaxserve.device.vocabulary import VocabularySearch
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Llama
from jaxserve.scheduling.sequence import EMITTED, FAILED, STOPPED
from pallas_kernels import Attended, LayerCache, PagedAttention
from pallas_kernels.linear import LiveRows


@pytree_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What the host reads of a step. Never donated: it is being copied to the host while the next step runs."""

    tokens_and_flags: Int32[Array, "2 row"]
    """The token of each row, then its flags (`sequence.EMITTED`, `STOPPED`, `FAILED`)."""
    logprobs: Float[Array, "row reported"]
    """Of the chosen token, then of the likeliest; zeros unless a row asked."""
    logprob_ids: Int32[Array, "row reported"]


Weights = tuple[Array, ...]
"""The model's parameters as a flat tuple: a tree of them costs a millisecond of Python a step to take apart."""

ForwardFunction = Callable[[Weights, KVCache, DecodeState, Array], tuple[KVCache, Array, Array, Array]]


def make_forward(
    build_model: Callable[[Weights], Llama], config: ModelConfig, attention: PagedAttention, rows: int, chunk: int
) -> ForwardFunction:
    """The first half of a step of `rows` rows and `chunk` chunk tokens (0 for a decode step).

    Its arguments are the model's weights, from which `build_model` makes the model while tracing, the cache (DONATED),
    the state and the packed int32 upload. It gives the cache; what `choose` takes: raw logits, and the rows' part of
    the upload; and the residual stream of the chunk, for `prompt_scores`.
    """

    def forward(
        weights: Weights, cache: KVCache, state: DecodeState, packed: Int32[Array, " packed"]
    ) -> tuple[KVCache, Float[Array, "row vocab"], Int32[Array, " packed_rows"], Float[Array, "chunk hidden"]]:
        model = build_model(weights)
        upload = Upload.unpack(packed, rows, chunk)
        decodes = upload.decodes & ~state.ended.at[upload.slot].get(mode="clip")
        tokens = jnp.concatenate([state.last_token.at[upload.slot].get(mode="clip"), upload.chunk_tokens])
        token_rows = jnp.concatenate([jnp.where(decodes, jnp.arange(rows), -1), upload.chunk_rows])
        positions = jnp.concatenate([jnp.maximum(upload.length - 1, 0), upload.chunk_positions])
        decoding = jnp.sum(upload.slot < state.ended.shape[0])
        live = LiveRows(jnp.stack([decoding, jnp.sum(upload.chunk_rows >= 0)]).astype(jnp.int32), rows)

        def attend(q: Array, k: Array, v: Array, cache: LayerCache) -> Attended:
            return attention.write_and_attend(
                q,
                k,
                v,
                cache,
                upload.page_table,
                token_rows,
                positions,
                scale=config.head_dim**-0.5,
                sliding_window=config.sliding_window,
            )

        hidden, cache = model.hidden(tokens, positions, attend, cache, live)
        sampled = hidden[:rows]
        if chunk:
            ends_prompt = (upload.sample_index >= 0)[:, None]
            sampled = jnp.where(ends_prompt, hidden[rows + jnp.maximum(upload.sample_index, 0)], sampled)
        logits = model.logits(sampled, LiveRows(live.counts.at[1].set(0), rows))
        packed_rows = packed[: Upload.size(rows, 0, upload.page_table.shape[1])]
        return cache, logits, packed_rows, hidden[rows:]

    return forward


ChooseFunction = Callable[[DecodeState, Array, Array, Array], tuple[DecodeState, StepOutput]]


def make_choose(search: VocabularySearch) -> ChooseFunction:
    """The second half of a step: samples, decides which rows ended, and writes both back to the slots.

    Its arguments are the state (DONATED), which must be the one that the first half saw; the logits and the rows' part
    of the upload, as the first half gives them; and what a constraint leaves of the vocabulary, by row: bit b of word w
    is token 32 w + b. Rows without a constraint do not look at it.
    """

    def choose(
        state: DecodeState,
        logits: Float[Array, "row vocab"],
        packed: Int32[Array, " packed_rows"],
        allowed: Int32[Array, "row mask_word"],
    ) -> tuple[DecodeState, StepOutput]:
        upload = Upload.unpack(packed, logits.shape[0], 0)
        decodes = upload.decodes & ~state.ended.at[upload.slot].get(mode="clip")
        samples = decodes | (upload.sample_index >= 0)
        tokens = sample_tokens(logits, upload, state, allowed, search)
        values, ids = report_logprobs(logits, tokens, upload, search)
        failed = ~jnp.isfinite(jnp.max(logits, axis=-1))
        stopped = jnp.any(tokens[:, None] == upload.stop_ids, axis=-1)
        flags = jnp.where(samples, EMITTED + STOPPED * stopped + FAILED * failed, 0)
        ended = stopped | failed | (upload.length + 1 >= upload.max_length)
        slot = jnp.where(samples, upload.slot, state.ended.shape[0])
        counted = jnp.where(upload.features & PENALIZES != 0, slot, state.ended.shape[0])
        state = DecodeState(
            last_token=state.last_token.at[slot].set(tokens, mode="drop"),
            ended=state.ended.at[slot].set(ended, mode="drop"),
            output_counts=state.output_counts.at[counted, tokens].add(1, mode="drop"),
            in_prompt=state.in_prompt,
            bias_ids=state.bias_ids,
            bias_values=state.bias_values,
        )
        return state, StepOutput(jnp.stack([tokens, flags.astype(jnp.int32)]), values, ids)

    return choose
