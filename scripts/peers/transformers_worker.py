"""transformers' continuous batching as a benchmark's peer: cases in, measurements out, a JSON line each.

    PEER_PYTHON scripts/peers/transformers_worker.py --gguf FILE --dtype bfloat16 --sequences 32

Runs in an interpreter that has torch and transformers, and imports nothing of jaxserve. The first line out says what
was loaded. Then, for each line in, {"case": "offline", "prompts": [[token id]], "output_len"}, one line
{"seconds", "tokens", "tokens_per_s"}: prompts and output_len greedy tokens each, end to end.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.initialization import WorkloadHints


class Peer:
    """A loaded model, and a manager of continuous batching whose thread runs only while a case does."""

    def __init__(self, arguments: argparse.Namespace):
        torch.set_num_threads(arguments.threads)
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            arguments.gguf.parent,
            gguf_file=arguments.gguf.name,
            dtype=getattr(torch, arguments.dtype),
            attn_implementation=arguments.attention,
        )
        self._model = model.eval()
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        hints = WorkloadHints(
            max_prompt_length=arguments.context,
            max_generated_length=arguments.context,
            num_requests=arguments.sequences,
        )
        # Memory is the machine's own on a CPU: without a bound most of it would be taken for the cache.
        batching = ContinuousBatchingConfig(max_memory_percent=arguments.memory)
        self._manager = self._model.init_continuous_batching(greedy, batching, hints)
        self._manager.warmup()

    @property
    def attention(self) -> str:
        """The implementation in use."""
        return self._model.config._attn_implementation

    def measure(self, case: str, prompts: list[list[int]], output_len: int) -> dict[str, float]:
        """One round."""
        if case != "offline":
            raise ValueError(f"case: must be offline, got {case!r}")
        manager = self._manager
        manager.start()
        start = time.perf_counter()
        with torch.no_grad():
            manager.add_requests(prompts, max_new_tokens=output_len)
            tokens = 0
            for _ in prompts:
                result = None
                while result is None:
                    if not manager.is_running():
                        raise RuntimeError("the generation thread of transformers ended")
                    result = manager.get_result(timeout=1)
                if result.error is not None:
                    raise RuntimeError(f"transformers failed a request: {result.error}")
                tokens += len(result.generated_tokens)
        seconds = time.perf_counter() - start
        manager.stop(block=True, keep_for_next_session=True)
        if tokens != len(prompts) * output_len:
            raise RuntimeError(f"{tokens} tokens came out of {len(prompts)} x {output_len}")
        return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}


def main() -> int:
    """Answers cases until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32, help="most prompts in a case")
    parser.add_argument("--context", type=int, default=512, help="most tokens of a prompt, and of an output")
    parser.add_argument("--memory", type=float, default=0.2, help="share of the free memory for its cache")
    peer = Peer(parser.parse_args())
    versions = {"version": transformers.__version__, "torch": torch.__version__, "attention": peer.attention}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.measure(**json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
