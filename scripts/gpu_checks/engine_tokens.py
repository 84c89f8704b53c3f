"""Greedy tokens of the engine on this device against the engine on the CPU: small fixtures, and seeded random weights.

python -m gpu_checks.engine_tokens DTYPE FOLDER...     prints one JSON list of tokens for each folder
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.workers import module_environment

from gpu_checks.random_model import FIXTURES, Sizes, random_folder

LENGTHS, OUTPUT = (1, 7, 40, 100), 24
FAMILIES = ("llama3", "mistral", "qwen3")


def run(rehearse: bool) -> Iterator[dict]:
    """float32 must agree in every token; bfloat16 says how many do before the first that differs."""
    results: dict = {"passed": True}
    with tempfile.TemporaryDirectory() as temporary:
        folders = [FIXTURES / name for name in (FAMILIES[:1] if rehearse else FAMILIES)]
        sizes = Sizes(2, 128, 2, 1, 256) if rehearse else Sizes(4, 1024, 8, 2, 2048)
        folders.append(random_folder(Path(temporary) / "random", sizes))
        for dtype in ("float32", "bfloat16"):
            here, on_cpu = (_tokens(folders, dtype, environment) for environment in ({}, {"JAX_PLATFORMS": "cpu"}))
            for folder, got, expected in zip(folders, here["tokens"], on_cpu["tokens"], strict=True):
                agreeing = sum(_agreeing(a, b) for a, b in zip(got, expected, strict=True))
                tokens = sum(map(len, expected))
                case = {"attention": here["attention"], "agreeing": agreeing, "tokens": tokens}
                results[f"{folder.name} {dtype}"] = case
                results["passed"] &= dtype != "float32" or agreeing == tokens
            yield results


def _agreeing(got: list[int], expected: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), len(expected))


def _tokens(folders: list[Path], dtype: str, environment: dict[str, str]) -> dict:
    command = [sys.executable, "-m", "gpu_checks.engine_tokens", dtype, *map(str, folders)]
    done = subprocess.run(command, env={**module_environment(), **environment}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} with {environment}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The worker."""
    from benchmarks.workload import greedy_request, random_prompts

    from jaxserve import Engine, EngineConfig

    dtype, *folders = sys.argv[1:]
    tokens, attention = [], ""
    for folder in folders:
        config = EngineConfig(
            model=folder, dtype="float32" if dtype == "float32" else "bfloat16", slots=8, max_context=256
        )
        with Engine(config) as engine:
            attention = engine.device.attention
            prompts = [random_prompts(1, length, 300, seed=length)[0] for length in LENGTHS]
            done = engine.generate([greedy_request(prompt, OUTPUT) for prompt in prompts])
            tokens.append([list(one.token_ids) for one in done])
    print(json.dumps({"attention": attention, "tokens": tokens, "platform": os.environ.get("JAX_PLATFORMS")}))


if __name__ == "__main__":
    main()
