"""Attention over a whole prompt at once, for comparing a model without the paged cache."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32

from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Uncached


def dense_logits(
    graphdef: nnx.GraphDef, config: ModelConfig, params: nnx.State, token_ids: Int32[Array, " token"]
) -> Float32[Array, "token vocab"]:
    """Logits of every position of a prompt, causal and within the sliding window; attention in float32."""
    positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
    distance = positions[:, None] - positions[None, :]
    visible = (distance >= 0) & (distance < (config.sliding_window or token_ids.shape[0]))

    def attend(
        q: Float[Array, "token q_head head_dim"],
        k: Float[Array, "token kv_head head_dim"],
        v: Float[Array, "token kv_head head_dim"],
        cache: None,
    ) -> tuple[Float[Array, "token q_head head_dim"], None]:
        group = config.num_q_heads // config.num_kv_heads
        keys, values = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        highest = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("qhd,khd->hqk", q, keys, precision=highest, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(jnp.where(visible, scores * config.head_dim**-0.5, -jnp.inf), axis=-1)
        return jnp.einsum("hqk,khd->qhd", weights.astype(v.dtype), values, precision=highest), cache

    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(token_ids, positions, attend, Uncached())
    return model.logits(hidden)
