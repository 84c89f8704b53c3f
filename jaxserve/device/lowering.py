"""The programs of the engine's steps, lowered for a placement, whether its devices are there or only described.

The engine compiles these with its weights and cache; a plan or a test with shapes alone, for devices it does not have.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxserve.config import EngineConfig
from jaxserve.device.batch import Upload
from jaxserve.device.choosing import ChoosingPrograms
from jaxserve.device.decode_state import DecodeState
from jaxserve.device.kv_cache import KVCache
from jaxserve.device.prompt_scores import SCORED, make_score
from jaxserve.device.sharding import Placement
from jaxserve.device.step import Prediction, Weights, make_forward
from jaxserve.device.vocabulary import search_on
from jaxserve.models.config import ModelConfig
from jaxserve.models.llama import Llama, abstract_llama
from jaxserve.models.parameters import named_parameters, with_values
from pallas_kernels import PagedAttention


@dataclass(frozen=True)
class StepInputs:
    """What a step works on: arrays, or shapes with their dtypes and shardings."""

    build_model: Callable[[Weights], Llama]
    """The model of each device's share of `weights`."""
    weights: Weights
    cache: KVCache
    state: DecodeState

    @staticmethod
    def abstract(
        model: ModelConfig, config: EngineConfig, attention: PagedAttention, num_pages: int, placement: Placement
    ) -> "StepInputs":
        """Those of an engine that multiplies by XLA, as shapes. Raises PlacementError, or ValueError for sizes that the
        attention does not support."""
        placement.check(model)
        graphdef, params = abstract_llama(model, config.dtype, config.quantization, shards=placement.shards)
        shapes = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=placement.parameter(name))
            for name, array in named_parameters(params).items()
        }
        weights, build_model = flatten_model(graphdef, with_values(params, shapes))
        cache = KVCache.layout(model, attention, num_pages, config, placement)
        return StepInputs(build_model, weights, cache, abstract_state(config.slots, model.vocab_size, placement))


def abstract_state(slots: int, vocab_size: int, placement: Placement) -> DecodeState:
    """Shapes, dtypes and shardings of the state, which is whole on every device."""
    return _abstract(lambda: DecodeState.zeros(slots, vocab_size), placement)


def _abstract[Tree](make: Callable[[], Tree], placement: Placement) -> Tree:
    whole = placement.sharding()
    shapes = jax.eval_shape(make)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole), shapes)


def flatten_model(graphdef: nnx.GraphDef, params: nnx.State) -> tuple[Weights, Callable[[Weights], Llama]]:
    """The parameters as a flat tuple, and what makes the model of such a tuple."""
    leaves, structure = jax.tree.flatten(params)
    return tuple(leaves), lambda weights: nnx.merge(graphdef, jax.tree.unflatten(structure, weights))


def lower_forward(
    inputs: StepInputs,
    model: ModelConfig,
    attention: PagedAttention,
    placement: Placement,
    rows: int,
    chunk: int,
    max_pages: int,
) -> jax.stages.Lowered:
    """The first half of a step of `rows` rows and `chunk` chunk tokens, with page tables of `max_pages`.

    Compiled, it takes what `make_forward` says and DONATES the cache. Over several devices each runs it on its own
    share of weights and cache; all else is whole on each.
    """
    search = search_on(placement.platform)
    forward = make_forward(inputs.build_model, model, attention, search, rows, chunk)
    if placement.tensor_parallel > 1:
        weights, cache = jax.tree.map(_spec, (inputs.weights, inputs.cache))
        whole = PartitionSpec()
        # What is gathered is equal on all devices, which shard_map cannot know.
        forward = jax.shard_map(
            forward,
            mesh=placement.mesh,
            in_specs=(weights, cache, whole, whole),
            out_specs=(cache, whole, whole, whole),
            check_vma=False,
        )
    upload = _whole((Upload.size(rows, chunk, max_pages),), jnp.int32, placement)
    return jax.jit(forward, donate_argnums=1).lower(inputs.weights, inputs.cache, inputs.state, upload)


def lower_choosing(
    programs: ChoosingPrograms[Callable[..., Any]],
    state: DecodeState,
    model: ModelConfig,
    placement: Placement,
    rows: int,
    max_pages: int,
) -> ChoosingPrograms[jax.stages.Lowered]:
    """The programs of the second half of a step, for `rows` rows.

    Every device does the same with the same logits, and so agrees on the tokens.
    """
    prediction = _abstract(lambda: Prediction.zeros(rows, model.vocab_size), placement)
    packed = _whole((Upload.size(rows, 0, max_pages),), jnp.int32, placement)
    allowed = _whole((rows, -(-model.vocab_size // 32)), jnp.int32, placement)
    thresholds = _whole((rows,), jnp.float32, placement)
    chosen = _whole((2, rows), jnp.int32, placement)
    arguments = {
        "process": (prediction, state, packed),
        "constrain": (prediction, packed, allowed),
        "weigh": (prediction, packed),
        "cut": (prediction.logits, packed),
        "draw": (state, prediction, packed, prediction.logits, thresholds),
        "take": (state, prediction, packed),
        "count": (state, chosen, packed),
        "report": (prediction, chosen),
    }

    def lower(name: str, program: Callable[..., Any]) -> jax.stages.Lowered:
        donated = 0 if name in ("draw", "take", "count") else ()
        step = jax.jit(program, donate_argnums=donated, out_shardings=placement.sharding())
        return step.lower(*arguments[name])

    return programs.map(lower)


def lower_score(
    build_model: Callable[[Weights], Llama],
    weights: Weights,
    model: ModelConfig,
    dtype: DTypeLike,
    placement: Placement,
    chunk: int,
) -> jax.stages.Lowered:
    """What scores prompt tokens of a step of `chunk` chunk tokens, as `make_score` says."""
    score = make_score(build_model, search_on(placement.platform))
    if placement.tensor_parallel > 1:
        whole = PartitionSpec()
        specs = (jax.tree.map(_spec, weights), whole, whole)
        score = jax.shard_map(score, mesh=placement.mesh, in_specs=specs, out_specs=whole, check_vma=False)
    hidden = _whole((chunk, model.hidden_size), dtype, placement)
    return jax.jit(score).lower(weights, hidden, _whole((1 + SCORED,), jnp.int32, placement))


def _whole(shape: tuple[int, ...], dtype: DTypeLike, placement: Placement) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placement.sharding())


def needed_bytes(programs: Iterable[jax.stages.Compiled], room: int) -> int:
    """Bytes that the programs of a step need on each device beside their arguments: what the one with the most
    temporaries has while it runs, and of the code, which lies there for all of them, what `room` does not hold."""
    analyses = [analysis for program in programs if (analysis := program.memory_analysis()) is not None]
    code = sum(int(analysis.generated_code_size_in_bytes) for analysis in analyses)
    return max((int(analysis.temp_size_in_bytes) for analysis in analyses), default=0) + max(0, code - room)


def _spec(leaf: Array | jax.ShapeDtypeStruct) -> PartitionSpec:
    sharding = leaf.sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    return sharding.spec
