"""One llama.cpp model as a benchmark's peer: cases in, measurements out, a JSON line each.

    PEER_PYTHON scripts/peers/llama_cpp_worker.py --gguf FILE --form bf16 --sequences 32 --cells 16384

Runs in an interpreter that has llama-cpp-python, and imports nothing of jaxserve. Uses the library's low-level calls:
one llama_batch carries a token of each sequence. The first line out says what was loaded. Then, for each line in,
{"case", "prompts": [[token id]], "output_len"}, one line {"seconds", "tokens", "tokens_per_s"}:

    decode   all prompts are processed first; then the time of output_len - 1 steps, a token for each sequence in each
    offline  prompts and output_len tokens each, end to end
    prefill  prompts alone, their last tokens' logits included
"""

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np

FILE_TYPES = {
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
"""Forms that `llama_model_quantize` makes; `shipped` is the file as it is."""
LOG_ERROR = 4
"""GGML_LOG_LEVEL_ERROR of ggml.h, which the bindings leave out."""


@llama_cpp.llama_log_callback
def log_errors(level: int, text: bytes, _: ctypes.c_void_p) -> None:
    """Passes on what is an error, and nothing else."""
    if level == LOG_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def converted(source: Path, form: str, folder: Path, threads: int) -> Path:
    """The model in another form, made once."""
    if form == "shipped":
        return source
    target = folder / f"{source.stem}.{form}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[form]
        params.allow_requantize = True
        params.nthread = threads
        partial = target.with_suffix(f".{os.getpid()}.partial")
        status = llama_cpp.llama_model_quantize(str(source).encode(), str(partial).encode(), params)
        if status != 0:
            raise RuntimeError(f"llama_model_quantize of {source} to {form} failed with {status}")
        partial.rename(target)
    return target


class Batch:
    """A llama_batch on numpy arrays, a sequence id for each token."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.tokens = np.zeros(capacity, np.int32)
        self.positions = np.zeros(capacity, np.int32)
        self.sequences = np.zeros(capacity, np.int32)
        self.wanted = np.zeros(capacity, np.int8)
        """1 where the token's logits are wanted."""
        self._counts = np.ones(capacity, np.int32)
        addresses = self.sequences.ctypes.data + 4 * np.arange(capacity, dtype=np.uint64)
        self._sequence_pointers = addresses.astype(np.uint64)

    def struct(self, count: int) -> llama_cpp.llama_batch:
        """The first `count` tokens as the library takes them."""

        def pointer(array: np.ndarray, kind: type) -> ctypes.c_void_p:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))

        batch = llama_cpp.llama_batch()
        batch.n_tokens = count
        batch.token = pointer(self.tokens, llama_cpp.llama_token)
        batch.pos = pointer(self.positions, llama_cpp.llama_pos)
        batch.n_seq_id = pointer(self._counts, ctypes.c_int32)
        batch.seq_id = pointer(self._sequence_pointers, ctypes.POINTER(llama_cpp.llama_seq_id))
        batch.logits = pointer(self.wanted, ctypes.c_int8)
        return batch


class Peer:
    """A loaded model with one KV cache for all sequences."""

    def __init__(self, arguments: argparse.Namespace):
        llama_cpp.llama_log_set(log_errors, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.file = converted(arguments.gguf, arguments.form, arguments.cache, arguments.threads)
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(self.file).encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {self.file}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = arguments.cells
        params.n_batch = params.n_ubatch = arguments.batch_tokens
        params.n_seq_max = arguments.sequences
        params.n_threads = params.n_threads_batch = arguments.threads
        params.kv_unified = arguments.kv == "unified"
        params.offload_kqv = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp could not make a context of {arguments.cells} cells")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = Batch(arguments.batch_tokens)

    def _run(self, count: int, outputs: int) -> np.ndarray:
        """Computes the batch's first `count` tokens; the argmax of each token whose logits are wanted."""
        status = llama_cpp.llama_decode(self._context, self._batch.struct(count))
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        if outputs == 0:
            llama_cpp.llama_synchronize(self._context)
            return np.zeros(0, np.int64)
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, shape=(outputs, self._vocab_size)).argmax(axis=1)

    def prefill(self, prompts: list[list[int]]) -> np.ndarray:
        """Processes prompts in full batches, several prompts in one where they fit; the first token of each."""
        batch, first_tokens, count = self._batch, [], 0
        llama_cpp.llama_memory_clear(self._memory, True)
        lengths = [len(prompt) for prompt in prompts]
        tokens = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
        sequences = np.repeat(np.arange(len(prompts), dtype=np.int32), lengths)
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        wanted = np.zeros(len(tokens), np.int8)
        wanted[np.cumsum(lengths) - 1] = 1
        for start in range(0, len(tokens), batch.capacity):
            piece = slice(start, start + batch.capacity)
            count = len(tokens[piece])
            batch.tokens[:count], batch.positions[:count] = tokens[piece], positions[piece]
            batch.sequences[:count], batch.wanted[:count] = sequences[piece], wanted[piece]
            first_tokens.append(self._run(count, int(wanted[piece].sum())))
        return np.concatenate(first_tokens)

    def decode(self, tokens: np.ndarray, positions: np.ndarray, steps: int) -> None:
        """`steps` greedy tokens for each sequence."""
        batch, count = self._batch, len(tokens)
        batch.sequences[:count] = np.arange(count)
        batch.wanted[:count] = 1
        for step in range(steps):
            batch.tokens[:count] = tokens
            batch.positions[:count] = positions + step
            tokens = self._run(count, count)

    def measure(self, case: str, prompts: list[list[int]], output_len: int) -> dict[str, float]:
        """One round of a case."""
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        start = time.perf_counter()
        tokens = self.prefill(prompts)
        if case == "decode":
            start = time.perf_counter()
        if case != "prefill":
            self.decode(tokens, lengths, output_len - 1)
        seconds = time.perf_counter() - start
        made = {"prefill": int(lengths.sum()), "decode": len(prompts) * (output_len - 1)}
        count = made.get(case, len(prompts) * output_len)
        return {"seconds": seconds, "tokens": count, "tokens_per_s": count / seconds}


def main() -> int:
    """Answers cases until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--form", choices=("shipped", *FILE_TYPES), required=True)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the converted files")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=32, help="most prompts in a case")
    parser.add_argument("--cells", type=int, default=16384, help="tokens in the KV cache, of all sequences together")
    parser.add_argument("--batch-tokens", type=int, default=512, help="most tokens in one llama_decode")
    parser.add_argument("--kv", choices=("unified", "split"), default="split", help="one KV buffer, or one a sequence")
    peer = Peer(parser.parse_args())
    print(json.dumps({"version": llama_cpp.__version__, "file_mb": peer.file.stat().st_size >> 20}), flush=True)
    for line in sys.stdin:
        print(json.dumps(peer.measure(**json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
