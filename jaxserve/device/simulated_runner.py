"""A device that sleeps: it takes a stated time for a step and gives scripted tokens.

The host's part of a step (plan, pack, retire, publish, deliver) is the real one, so it can be judged at any number of
slots without an accelerator.
"""

import time
from dataclasses import dataclass

from jaxserve.config import EngineConfig
from jaxserve.device.allocation import context_pages, full_context
from jaxserve.device.batch import Packer
from jaxserve.models.config import ModelConfig
from jaxserve.scheduling.sequence import EMITTED, STOPPED, StepPlan, StepResults


@dataclass(frozen=True)
class SimulatedStep:
    """A dispatched step and the monotonic second at which it will be done."""

    plan: StepPlan
    done: float


class SimulatedRunner:
    """Runs steps one after another, each in `config.simulated_step_ms`, on a clock of its own.

    A step starts when it is dispatched or when the one before it is done, whichever is later; the time between is the
    device's idle time. Waiting releases the GIL, as waiting for a real device does.
    """

    platform = "simulated"
    device_kind = "simulated"
    attention_name = "none"
    matmul = "none"
    compiles_after_warmup = 0
    host_pages = 0

    def __init__(self, config: EngineConfig, model: ModelConfig):
        assert config.simulated_step_ms is not None
        self._seconds = config.simulated_step_ms / 1e3
        self._vocab_size = model.vocab_size
        max_pages = context_pages(model, config)
        self.num_pages = config.num_pages or config.slots * max_pages + 1
        self.max_context = min(full_context(model, config), (self.num_pages - 1) * config.page_size)
        self._slots = config.slots
        self._packer = Packer(config.slots, max_pages)
        self._chunk_sizes = (0, *config.prefill_chunks)
        self._free_at = 0.0

    def forward(self, plan: StepPlan) -> SimulatedStep:
        """Packs the plan and starts its step."""
        chunk = next(size for size in self._chunk_sizes if size >= plan.chunk_tokens)
        self._packer.pack(plan, self._slots, chunk)
        self._free_at = max(time.monotonic(), self._free_at) + self._seconds
        return SimulatedStep(plan, self._free_at)

    def choose(self, forward: SimulatedStep, masks: None) -> SimulatedStep:
        """A step of this device is one whole."""
        return forward

    def read(self, pending: SimulatedStep) -> StepResults:
        """Waits until a step is done."""
        plan = pending.plan
        # Letters and spaces of a byte-level vocabulary, so that detokenizing does its usual work.
        tokens = [260 + (end * 7919) % min(1000, self._vocab_size - 260) for end in plan.ends]
        results = StepResults(tokens, _flags(plan, tokens), None)
        wait = pending.done - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        return results

    def reset(self) -> None:
        """A device without state has nothing to rebuild."""


def _flags(plan: StepPlan, tokens: list[int]) -> list[int]:
    """What the device says of each row: whether it sampled, and whether its token is one of its stop ids."""
    flags = []
    for sequence, decodes, index, end, token in zip(
        plan.sequences, plan.decodes, plan.sample_index, plan.ends, tokens, strict=True
    ):
        submit = sequence.submit
        sampled = decodes or index >= 0
        stopped = token in submit.stop_ids and end >= submit.min_length
        flags.append((EMITTED | STOPPED if stopped else EMITTED) if sampled else 0)
    return flags
