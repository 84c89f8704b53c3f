"""The first half of a step, `forward`: from the upload to what the model predicts. Of fixed shape, the same everywhere.

A decode step has R rows; a mixed step has C chunk tokens beside them. Rows do not mix, so a row's result depends on its
own sequence alone.

The second half is in `choosing`; neither is waited for. What a row with a constraint may choose follows from its last
token: the host reads that and finds it out while the forward runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxserve.device.batch import Upload
from jaxserve.device.decode_state import DecodeState
from jaxserve.device.kv_cache import KVCache
from jaxserve.device.pytree import pytree_dataclass
from jaxserve.device.vocabulary import VocabularySearch, at_tokens
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Llama
from pallas_kernels import Attended, LayerCache, PagedAttention
from pallas_kernels.linear import LiveRows


@pytree_dataclass
@dataclass(frozen=True)
class Prediction:
    """Of the next token of each row."""

    logits: Float[Array, "row vocab"]
    """float32."""
    likeliest: Int32[Array, " row"]
    """Of equals, the first; a NaN counts as the largest."""
    failed: Bool[Array, " row"]
    """The model's own logits have a NaN, an infinity, or nothing else than minus infinity."""

    @staticmethod
    def zeros(rows: int, vocab_size: int) -> "Prediction":
        """Of equal logits."""
        tokens = jnp.zeros(rows, jnp.int32)
        return Prediction(jnp.zeros((rows, vocab_size), jnp.float32), tokens, tokens > 0)


Weights = tuple[Array, ...]
"""The model's parameters as a flat tuple: a tree of them costs a millisecond of Python a step to take apart."""

ForwardFunction = Callable[[Weights, KVCache, DecodeState, Array], tuple[KVCache, Prediction, Array, Array]]


def make_forward(
    build_model: Callable[[Weights], Llama],
    config: ModelConfig,
    attention: PagedAttention,
    search: VocabularySearch,
    rows: int,
    chunk: int,
) -> ForwardFunction:
    """The first half of a step of `rows` rows and `chunk` chunk tokens (0 for a decode step).

    Its arguments are the model's weights, from which `build_model` makes the model while tracing, the cache (DONATED),
    the state and the packed int32 upload. It gives the cache; what `choosing` takes: the prediction and the rows' part
    of the upload; and the residual stream of the chunk, for `prompt_scores`.
    """

    def forward(
        weights: Weights, cache: KVCache, state: DecodeState, packed: Int32[Array, " packed"]
    ) -> tuple[KVCache, Prediction, Int32[Array, " packed_rows"], Float[Array, "chunk hidden"]]:
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
        likeliest = search.argmax(logits)
        failed = ~jnp.isfinite(at_tokens(logits, likeliest))
        packed_rows = packed[: Upload.size(rows, 0, upload.page_table.shape[1])]
        return cache, Prediction(logits, likeliest, failed), packed_rows, hidden[rows:]

    return forward
