"""The device side of an engine: parameters, live cache and state, and the compiled steps.

A step is dispatched in two halves, `forward` and `choose`, which do not wait for the device; `read` is the one place
that does, and `forward` before a step that saves or restores more pages than the device has room for. The second half
is the programs that its rows ask for.
"""

import itertools
import logging
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import monitoring

from jaxserve.checkpoints.loading import LoadedModel
from jaxserve.config import EngineConfig, Matmul
from jaxserve.device import lowering
from jaxserve.device.allocation import Allocation, allocate, attention_needs, device_in_use, device_limit, full_context
from jaxserve.device.batch import BIASES, PENALIZES, REPORTS_LOGPROBS, SAMPLES, Packer, features_of
from jaxserve.device.choosing import CUT, PROCESSED, make_choosing
from jaxserve.device.decode_state import DecodeState, take_slot
from jaxserve.device.huge_pages import use_huge_pages
from jaxserve.device.kv_cache import KVCache
from jaxserve.device.lowering import StepInputs, abstract_state, flatten_model, needed_bytes
from jaxserve.device.page_copies import PageCopies
from jaxserve.device.prompt_scores import PendingScores, PromptScorer, logprobs_of, read_scores
from jaxserve.device.step import Prediction
from jaxserve.device.vocabulary import search_on
from jaxserve.models.packing import pack_params
from jaxserve.request import MAX_LOGIT_BIAS
from jaxserve.scheduling.sequence import StepPlan, StepResults
from pallas_kernels import native_build, select

log = logging.getLogger(__name__)

_compiles: Counter[int] = Counter()
"""Programs compiled so far, by the thread that compiled them: a process may use JAX beside the engine."""


def _count_compile(event: str, duration_secs: float, **_: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiles[threading.get_ident()] += 1


monitoring.register_event_duration_secs_listener(_count_compile)


@dataclass(frozen=True)
class Forward:
    """The first half of a step, dispatched."""

    plan: StepPlan
    features: int
    """Of its rows together."""
    prediction: Prediction
    packed_rows: jax.Array
    chunk_hidden: jax.Array


@dataclass(frozen=True)
class PendingStep:
    """A dispatched step whose output is on its way to the host."""

    plan: StepPlan
    chosen: jax.Array
    """Tokens and flags."""
    logprobs: tuple[jax.Array, jax.Array] | None
    """Values and tokens, if a row asks."""
    scores: list[PendingScores]


class ModelRunner:
    """Compiles the steps of one model on the devices that share it and runs them.

    Args:
        model: loaded parameters, on the devices.
        config: the engine's configuration.
        progress: called with what is being compiled and the fraction done.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig, progress=lambda what, fraction: None):
        self._placement = model.placement
        device = model.placement.devices[0]
        self.platform: str = device.platform
        self.device_kind: str = device.device_kind
        self.model_config = model.config
        self.config = config
        needs = attention_needs(model.config, config, self.device_kind)
        self.attention = select(model.placement.platform, config.attention, needs)
        self.attention_name = self.attention.name
        self.matmul = _choose_matmul(device.platform, config)
        graphdef, params = model.graphdef, model.params
        if self.matmul == "native":
            progress("packing weights", None)
            graphdef, params = pack_params(model.config, params, config.quantization)
        self._weights, self._build_model = flatten_model(graphdef, params)
        if device.platform == "cpu":
            use_huge_pages(self._weights)
        self.row_counts = _row_counts(config, self.matmul)
        self.chunk_sizes = config.prefill_chunks
        self._no_thresholds = {rows: self._put(np.zeros(rows, np.float32)) for rows in self.row_counts}
        self._take_pages(self._allocate())
        with ThreadPoolExecutor(max_workers=1) as pool:
            # A CPU, which alone has no limit, takes a second for the cache. Elsewhere the steps say first what is left.
            zeroing = pool.submit(self._begin_empty) if self.allocation.limit is None else None
            self._forwards, self._choosing = self._compile_steps(progress)
        if zeroing is None:
            self._begin_empty()
        else:
            zeroing.result()
        self._packer = Packer(config.slots, self._max_pages)
        self._scorer = self._compile_scorer()
        self._take_slot = self._compile_take_slot()
        self._copies = PageCopies(self._cache, self._placement.sharding())
        self._warm_up(progress)
        self._thread = threading.get_ident()
        self._compiles_at_warmup = _compiles[self._thread]

    def _allocate(self, temporaries: int | None = None) -> Allocation:
        return allocate(
            self.model_config,
            self.attention,
            self.config,
            limit=device_limit(self._placement),
            weights=device_in_use(self._placement),
            temporaries=temporaries,
        )

    def _take_pages(self, allocation: Allocation) -> None:
        """Sizes that follow from the pages. A table as wide as the pages there are is as wide as any request needs."""
        self.allocation = allocation
        self.num_pages = allocation.num_pages
        devices = self._placement.tensor_parallel * self.config.replicas
        self.host_pages = self.config.host_cache_bytes // (allocation.page * devices)
        capacity = (self.num_pages - 1) * self.config.page_size
        self.max_context = min(full_context(self.model_config, self.config), capacity)
        self._max_pages = -(-self.max_context // self.config.page_size)
        self._cache_layout = KVCache.layout(
            self.model_config, self.attention, self.num_pages, self.config, self._placement
        )

    @property
    def compiles_after_warmup(self) -> int:
        """Programs that the step loop's thread, which made this runner, compiled since. More than 0 is a defect."""
        return _compiles[self._thread] - self._compiles_at_warmup

    def reset(self) -> None:
        """An empty cache and state, after a step failed. What is left of those before goes first, whoever refers to it
        still: a device has no room for two."""
        for array in jax.tree.leaves((self._cache, self._state)):
            array.delete()
        self._begin_empty()

    def _begin_empty(self) -> None:
        self._cache = KVCache.zeros(self._cache_layout)
        self._state = self._put(DecodeState.zeros(self.config.slots, self.model_config.vocab_size))

    def _put[Tree](self, tree: Tree) -> Tree:
        """Arrays of the host, or of one device, whole on each of the devices that share the model."""
        return jax.device_put(tree, self._placement.sharding())

    def _compile_steps(self, progress):
        """Every step, for as many pages as memory has room for beside what the compiled steps themselves need."""
        forwards, choosing = self._compile_for_pages(progress)
        programs = itertools.chain(forwards.values(), *choosing.values())
        # Half of the headroom is for code, which grows with the layers, and on TPUs with page tables in many parts.
        needed = needed_bytes(programs, self.allocation.headroom // 2)
        if self.allocation.limit is None or needed <= self.allocation.temporaries:
            return forwards, choosing
        log.warning("the steps need %d bytes beside the cache, more than was expected", needed)
        del forwards, choosing, programs  # their code lies there too
        self._take_pages(self._allocate(needed))
        return self._compile_for_pages(progress)

    def _compile_for_pages(self, progress):
        shapes = [(rows, 0) for rows in self.row_counts] + [(self.config.slots, chunk) for chunk in self.chunk_sizes]
        model, placement, max_pages = self.model_config, self._placement, self._max_pages
        state = abstract_state(self.config.slots, model.vocab_size, placement)
        inputs = StepInputs(self._build_model, self._weights, self._cache_layout, state)
        programs = make_choosing(search_on(placement.platform))
        done, total = 0, len(shapes) + len(self.row_counts) * len(programs)

        def compile_program(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
            nonlocal done
            compiled = lowered.compile()
            done += 1
            progress("compiling", done / total)
            return compiled

        progress("compiling", 0.0)
        # XLA compiles outside the GIL: tracing one program overlaps with compiling another.
        with ThreadPoolExecutor(max_workers=2) as pool:

            def submit(_: str, lowered: jax.stages.Lowered) -> Future[jax.stages.Compiled]:
                return pool.submit(compile_program, lowered)

            step = (inputs, model, self.attention, placement)
            forwards = {shape: submit("forward", lowering.lower_forward(*step, *shape, max_pages)) for shape in shapes}
            choosing = {
                rows: lowering.lower_choosing(programs, state, model, placement, rows, max_pages).map(submit)
                for rows in self.row_counts
            }
            return (
                {shape: future.result() for shape, future in forwards.items()},
                {rows: programs.map(lambda _, future: future.result()) for rows, programs in choosing.items()},
            )

    def _compile_scorer(self) -> PromptScorer:
        shape = (self._build_model, self._weights, self.model_config, self.config.dtype, self._placement)
        programs = {chunk: lowering.lower_score(*shape, chunk).compile() for chunk in self.chunk_sizes}
        return PromptScorer(programs, self._weights, self._placement.sharding())

    def _compile_take_slot(self):
        whole = self._placement.sharding()
        ids = jax.ShapeDtypeStruct((self.max_context,), jnp.int32, sharding=whole)
        bias = [jax.ShapeDtypeStruct((MAX_LOGIT_BIAS,), dtype, sharding=whole) for dtype in (jnp.int32, jnp.float32)]
        scalar = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        return jax.jit(take_slot, donate_argnums=0).lower(self._state, scalar, ids, ids, *bias).compile()

    def _warm_up(self, progress) -> None:
        """Runs every program once on rows that no sequence owns: nothing is written."""
        for number, (rows, chunk) in enumerate(self._forwards):
            progress("warming up", number / len(self._forwards))
            forward = self._forward(StepPlan(0), rows, chunk)
            if chunk:
                self._scorer.warm_up(forward.chunk_hidden)
            else:
                self._warm_up_choosing(forward)
        self._own_slot(0, [], 0, {})
        zero = self._copies.to_host(self._copies.save(self._cache, [0]), 1)
        self._cache = self._copies.restore(self._cache, zero, 0, [0])
        jax.block_until_ready(self._state)
        progress("warming up", 1.0)

    def _warm_up_choosing(self, forward: Forward) -> None:
        programs = self._choosing[len(forward.prediction.likeliest)]
        for features in (0, PROCESSED, *(SAMPLES | cut for cut in programs.cut), REPORTS_LOGPROBS):
            self.read(self.choose(replace(forward, features=features), None))
        words = -(-self.model_config.vocab_size // 32)
        self.read(self.choose(forward, np.zeros((0, words), np.int32)))

    def forward(self, plan: StepPlan) -> Forward:
        """Uploads a plan and starts the first half of its step, behind the steps already started."""
        for saved, pages in plan.saves:
            saved.data = self._copies.save(self._cache, pages)
        for saved, first, pages in plan.restores:
            self._cache = self._copies.restore(self._cache, saved.data, first, pages)
        for slot, sequence in plan.new_owners:
            if features_of(sequence.submit) & (PENALIZES | BIASES):
                self._own_slot(slot, sequence.token_ids, sequence.prompt_length, sequence.submit.logit_bias)
        chunk = next(size for size in (0, *self.chunk_sizes) if size >= plan.chunk_tokens)
        enough = (count for count in self.row_counts if count >= len(plan.sequences))
        rows = self.config.slots if chunk else next(enough)
        return self._forward(plan, rows, chunk)

    def _forward(self, plan: StepPlan, rows: int, chunk: int) -> Forward:
        packed = self._packer.pack(plan, rows, chunk)
        step = self._forwards[rows, chunk]
        self._cache, prediction, packed_rows, hidden = step(self._weights, self._cache, self._state, packed)
        return Forward(plan, self._packer.features(packed, rows), prediction, packed_rows, hidden)

    def choose(self, forward: Forward, masks: np.ndarray | None) -> PendingStep:
        """Starts the second half of a step. `masks`, if a row has a constraint: int32, a line for each row of the plan,
        as `ChoosingPrograms.constrain` takes them; it must not be written again."""
        prediction, packed, features = forward.prediction, forward.packed_rows, forward.features
        rows = len(prediction.likeliest)
        programs = self._choosing[rows]
        if features & PROCESSED:
            prediction = programs.process(prediction, self._state, packed)
        if masks is not None:
            allowed = self._put(np.pad(masks, ((0, rows - len(masks)), (0, 0))))
            prediction = programs.constrain(prediction, packed, allowed)
        if features & SAMPLES:
            weights = programs.weigh(prediction, packed)
            thresholds = programs.cutting(features)(weights, packed) if features & CUT else self._no_thresholds[rows]
            self._state, chosen = programs.draw(self._state, prediction, packed, weights, thresholds)
        else:
            self._state, chosen = programs.take(self._state, prediction, packed)
        chosen.copy_to_host_async()
        if features & PENALIZES:
            self._state = programs.count(self._state, chosen, packed)
        logprobs = None
        if features & REPORTS_LOGPROBS:
            logprobs = programs.report(forward.prediction, chosen)
            for array in logprobs:
                array.copy_to_host_async()
        return PendingStep(forward.plan, chosen, logprobs, self._scorer.start(forward.plan, forward.chunk_hidden))

    def read(self, pending: PendingStep) -> StepResults:
        """Waits for a step and gives its tokens."""
        tokens, flags = np.asarray(pending.chosen).tolist()
        for saved, _ in pending.plan.saves:
            saved.data = self._copies.to_host(saved.data, saved.pages)
        scores = read_scores(pending.plan, pending.scores)
        if pending.logprobs is None:
            return StepResults(tokens, flags, None, scores)
        values, ids = (array.tolist() for array in jax.device_get(pending.logprobs))
        logprobs = []
        for row, sequence in enumerate(pending.plan.sequences):
            top = max(sequence.submit.logprobs, 0) + 1
            logprobs.append(logprobs_of(ids[row], values[row], top))
        return StepResults(tokens, flags, logprobs, scores)

    def _own_slot(self, slot: int, token_ids: list[int], prompt_length: int, bias: dict[int, float]) -> None:
        beyond = self.model_config.vocab_size
        ids = np.full((2, self.max_context), beyond, np.int32)
        ids[0, :prompt_length] = token_ids[:prompt_length]
        ids[1, : len(token_ids) - prompt_length] = token_ids[prompt_length:]
        bias_ids = np.full(MAX_LOGIT_BIAS, beyond, np.int32)
        bias_values = np.zeros(MAX_LOGIT_BIAS, np.float32)
        bias_ids[: len(bias)] = list(bias.keys())
        bias_values[: len(bias)] = list(bias.values())
        arguments = self._put((np.int32(slot), ids[0], ids[1], bias_ids, bias_values))
        self._state = self._take_slot(self._state, *arguments)


def _row_counts(config: EngineConfig, matmul: Matmul) -> tuple[int, ...]:
    """Rows of the steps, ascending. One request alone has a step of its own where XLA multiplies nothing: its own
    products are other bits below 8 rows."""
    alone = {1} if matmul == "native" else set()
    return tuple(sorted({*alone, min(config.small_slots, config.slots), config.slots}))


def _choose_matmul(platform: str, config: EngineConfig) -> Matmul:
    """As configured, or the native kernel on a CPU where it can be built and the weights are not shared."""
    if config.matmul is not None:
        return config.matmul
    shared = config.tensor_parallel > 1
    return "native" if platform == "cpu" and not shared and native_build.available() else "xla"


def enable_compilation_cache(folder: str | None) -> None:
    """Points JAX's persistent compilation cache at a folder, for every program however small. Where there can be none,
    as without a home or on a disk that is read-only, programs are compiled at each start."""
    if folder is not None:
        try:
            path = Path(folder).expanduser()
            path.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:  # the latter where the user has no home
            log.warning("compiled programs are not kept: %s: %s", folder, error)
            return
        jax.config.update("jax_compilation_cache_dir", str(path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
