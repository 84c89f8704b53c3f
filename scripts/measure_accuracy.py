"""What a dtype or quantization costs in accuracy, on real text: the documentation that comes with Python.

    python scripts/measure_accuracy.py --model smollm2-135m [--json]

Prints the perplexity of each form, and against float32 the mean divergence (KL, in nats a token) and how often the
likeliest token is the same. Weights are packed for the native kernel where it can be built, as an engine does: with
int4 it quantizes activations, which plain XLA does not.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int32

from jaxserve.checkpoints.description import describe_model
from jaxserve.checkpoints.loading import load_model
from jaxserve.config import Quantization
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Uncached
from jaxserve.models.packing import pack_params
from jaxserve.tokenizing.tokenizer import Tokenizer
from pallas_kernels import native_build

FORMS: tuple[tuple[str, Quantization], ...] = (
    ("float32", "none"),
    ("bfloat16", "none"),
    ("bfloat16", "int8"),
    ("float32", "int8"),
    ("bfloat16", "int4"),
    ("float32", "int4"),
)


def window_logprobs(graphdef: nnx.GraphDef, config: ModelConfig):
    """The compiled log-probabilities of every position of a window, by dense causal attention."""
    group = config.num_q_heads // config.num_kv_heads

    def attend(q: Array, k: Array, v: Array, cache: None) -> tuple[Array, None]:
        keys, values = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        scores = jnp.einsum("qhd,khd->hqk", q, keys, preferred_element_type=jnp.float32) * config.head_dim**-0.5
        causal = jnp.tril(jnp.ones(scores.shape[1:], bool))
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        return jnp.einsum("hqk,khd->qhd", weights.astype(v.dtype), values), cache

    def logprobs(params: nnx.State, token_ids: Int32[Array, " token"]) -> Float32[Array, "token vocab"]:
        model = nnx.merge(graphdef, params)
        positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        hidden, _ = model.hidden(token_ids, positions, attend, Uncached())
        return jax.nn.log_softmax(model.logits(hidden))

    return jax.jit(logprobs)


def main() -> int:
    """Runs the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    arguments = parser.parse_args()
    text = "\n".join(topics[name] for name in sorted(topics))
    _, source = describe_model(arguments.model)
    ids = jnp.asarray(Tokenizer.from_source(source).encode(text), jnp.int32)
    windows = ids[: arguments.windows * arguments.window].reshape(arguments.windows, arguments.window)
    reference, result = [], {}
    for dtype, quantization in FORMS:
        model = load_model(arguments.model, dtype, quantization)
        graphdef, params = model.graphdef, model.params
        if native_build.available():
            graphdef, params = pack_params(model.config, params, quantization)
        compiled = window_logprobs(graphdef, model.config)
        loss = divergence = agree = 0.0
        for index, window in enumerate(windows):
            logprobs = compiled(params, window)
            if len(reference) == index:
                reference.append(logprobs)
            exact = reference[index]
            loss -= float(jnp.take_along_axis(logprobs[:-1], window[1:, None], axis=-1).mean())
            divergence += float(jnp.sum(jnp.exp(exact) * (exact - logprobs), axis=-1).mean())
            agree += float((jnp.argmax(logprobs, -1) == jnp.argmax(exact, -1)).mean())
        count = len(windows)
        result[f"{dtype}/{quantization}"] = {
            "perplexity": round(math.exp(loss / count), 4),
            "kl_nats": round(divergence / count, 6),
            "same_top_token": round(agree / count, 4),
        }
        print(f"{dtype:9} {quantization:5} {result[f'{dtype}/{quantization}']}", flush=True)
    if arguments.json:
        print(json.dumps({"model": arguments.model, "tokens": int(windows.size), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
