"""Greedy tokens of the engine on this device against the engine on the CPU: small fixtures, and seeded random weights.

python -m gpu_checks.engine_tokens (DTYPE FOLDER)...     prints one JSON object for each folder
"""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import batched
from pathlib import Path

from benchmarks.workers import module_environment, python_module

from gpu_checks.cases import Case, Options, json_object
from gpu_checks.random_model import FIXTURES, Sizes, random_folder
from jaxserve.config import EngineConfig

LENGTHS, OUTPUT = (1, 7, 40, 100), 24
FAMILIES = ("llama3", "mistral", "qwen3")
FEW_SECONDS = 120.0
"""With less, one family has to do beside the random weights."""


def cases(options: Options) -> Iterator[Case]:
    """float32 must agree in every token; bfloat16, which is what is served, says how many do before one differs."""
    few = options.rehearse or options.seconds < FEW_SECONDS
    # The random one first: its sizes are nearer to those of a served model than the fixtures' are.
    names = ("random", *(FAMILIES[:1] if few else FAMILIES))
    wanted = [(dtype, name) for dtype in ("bfloat16", "float32") for name in names]
    wanted = [pair for pair in wanted if _name(*pair) not in options.skip]
    if not wanted:
        return
    with tempfile.TemporaryDirectory() as temporary:
        sizes = Sizes(2, 128, 2, 1, 256) if options.rehearse else Sizes(4, 1024, 8, 2, 2048)
        folders = {name: FIXTURES / name for name in FAMILIES}
        folders["random"] = random_folder(Path(temporary) / "random", sizes)
        work = [text for dtype, name in wanted for text in (dtype, str(folders[name]))]
        # Side by side, each through all of the work: the CPU's tokens are there when the device's are.
        with _worker(work, {}) as here, _worker(work, {"JAX_PLATFORMS": "cpu"}) as on_cpu:
            for dtype, name in wanted:
                yield _name(dtype, name), functools.partial(_compare, dtype, name, here, on_cpu)


def _name(dtype: str, folder: str) -> str:
    return f"{folder} {dtype}"


def _compare(dtype: str, name: str, here: subprocess.Popen[bytes], on_cpu: subprocess.Popen[bytes]) -> dict:
    got, expected = _answer(here), _answer(on_cpu)
    pairs = list(zip(got["tokens"], expected["tokens"], strict=True))
    agreeing, tokens = sum(_agreeing(a, b) for a, b in pairs), sum(len(b) for _, b in pairs)
    return {
        "device": got["device"],
        "compile_cache": EngineConfig.compilation_cache,
        "passed": dtype != "float32" or agreeing == tokens,
        _name(dtype, name): {"attention": got["attention"], "agreeing": agreeing, "tokens": tokens},
    }


def _agreeing(got: list[int], expected: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), len(expected))


@contextmanager
def _worker(work: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that answers for one folder after another. What it says on stderr is said here."""
    command = python_module("gpu_checks.engine_tokens", *work)
    with subprocess.Popen(command, env={**module_environment(), **environment}, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def _answer(process: subprocess.Popen[bytes]) -> dict:
    assert process.stdout is not None
    for line in process.stdout:
        if (answer := json_object(line)) is not None:
            return answer
    raise RuntimeError(f"a worker ended with {process.wait()}")


def main() -> None:
    """The worker."""
    from benchmarks.workload import greedy_request, random_prompts

    from jaxserve import Engine

    for dtype, folder in batched(sys.argv[1:], 2):
        config = EngineConfig(
            model=folder, dtype="float32" if dtype == "float32" else "bfloat16", slots=8, max_context=256
        )
        with Engine(config) as engine:
            prompts = [random_prompts(1, length, 300, seed=length)[0] for length in LENGTHS]
            done = engine.generate([greedy_request(prompt, OUTPUT) for prompt in prompts])
            tokens, device = [list(one.token_ids) for one in done], engine.device
            answer = {"attention": device.attention, "device": device.device_kind, "tokens": tokens}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
