"""The requests that benchmarks send."""

import random

from jaxserve.request import OutputParams, Request, SamplingParams, StoppingParams
from jaxserve.tokenizing.tokenizer import Tokenizer

FIRST_TEXT_ID = 17
"""Token ids below this are special in SmolLM2."""


def random_prompts(count: int, length: int, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    """Prompts of random token ids: they share no prefix with each other or with those of another seed."""
    random_ = random.Random(seed)
    return [tuple(random_.randrange(FIRST_TEXT_ID, vocab_size) for _ in range(length)) for _ in range(count)]


def random_texts(count: int, length: int, tokenizer: Tokenizer, seed: int) -> list[str]:
    """Prompts of random words, each one token with the space before it: `length` tokens, where no ids can be sent."""
    random_ = random.Random(seed)
    texts = [data.decode("ascii", "ignore") for data in tokenizer.text_bytes]
    words = [text for text in texts if text.startswith(" ") and text[1:].isalpha()]
    return ["".join(random_.choices(words, k=length)) for _ in range(count)]


def greedy_request(
    prompt: tuple[int, ...] | str,
    output_len: int,
    *,
    stop_token_ids: tuple[int, ...] = (),
    return_text: bool = False,
    cache_salt: str = "",
) -> Request:
    """A request that runs to `output_len` tokens, unless one of `stop_token_ids` comes first. `prompt`: token
    ids or text."""
    is_text = isinstance(prompt, str)
    return Request(
        prompt=prompt if is_text else None,
        token_ids=None if is_text else prompt,
        sampling=SamplingParams(temperature=0.0),
        stopping=StoppingParams(max_tokens=output_len, ignore_eos=True, stop_token_ids=stop_token_ids),
        output=OutputParams(return_text=return_text),
        cache_salt=cache_salt,
    )
