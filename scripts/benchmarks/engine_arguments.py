"""The engine's options on the command lines of benchmarks."""

import argparse
from typing import get_args

from jaxserve.config import CoreKind, EngineConfig, Quantization

OPTIONS = ("model", "dtype", "quantization", "attention", "matmul", "slots", "prefill_chunks", "max_context",
           "pipeline_depth", "core", "simulated_step_ms")  # fmt: skip
"""The fields of an EngineConfig that have an option."""


def add_engine_arguments(
    parser: argparse.ArgumentParser, *, several_slots: bool = False, core: CoreKind = EngineConfig.core
) -> None:
    """Adds the options; with `several_slots`, --slots takes a list. `core` is the default of --core."""
    group = parser.add_argument_group("engine")
    group.add_argument("--model", default=EngineConfig.model)
    group.add_argument("--dtype", choices=("bfloat16", "float32"), default=EngineConfig.dtype)
    group.add_argument("--quantization", choices=get_args(Quantization), default=EngineConfig.quantization)
    group.add_argument("--attention", default=None, help="attention implementation; the platform's own if unset")
    group.add_argument(
        "--matmul", choices=("xla", "native"), default=None, help="how weights are multiplied; as is best if unset"
    )
    if several_slots:
        group.add_argument("--slots", type=int, nargs="+", default=[EngineConfig.slots], help="one run for each")
    else:
        group.add_argument("--slots", type=int, default=EngineConfig.slots)
    group.add_argument(
        "--prefill-chunks", type=int, nargs="+", default=list(EngineConfig.prefill_chunks), help="tokens"
    )
    group.add_argument("--max-context", type=int, default=2048, help="tokens")
    group.add_argument(
        "--pipeline-depth", type=int, default=EngineConfig.pipeline_depth, help="steps ahead; 0 is synchronous"
    )
    group.add_argument("--core", choices=("thread", "process"), default=core)
    group.add_argument(
        "--simulated-step-ms", type=float, default=None, help="a device that sleeps this long a step, not the model"
    )


def add_run_arguments(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Adds what every benchmark has."""
    parser.add_argument("--rounds", type=int, default=rounds, help="medians are over the rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


def engine_config(arguments: argparse.Namespace, **fields: object) -> EngineConfig:
    """The configuration that the options ask for; `fields` override them."""
    return EngineConfig.from_json({name: getattr(arguments, name) for name in OPTIONS} | fields)
