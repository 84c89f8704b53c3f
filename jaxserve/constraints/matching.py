"""Holding an output to a grammar, with llguidance: the vocabulary that it works in, and grammars compiled for it."""

import re
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""What compiling a grammar, and each mask after that, may take: the library's own bounds, with fewer states of the
lexer. A state takes a KiB or two and ten microseconds to make, and most grammars have a few hundred."""


class GrammarError(ValueError):
    """A grammar that no output can be held to; the message says why."""


class _Tokens:
    """A vocabulary in the form that the library reads."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int], eos_ids: Sequence[int]):
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.eos_token_id = eos_ids[0]

    def __call__(self, text: bytes | str) -> list[int]:
        """Unused: how to write what a grammar forces is left to the model, not to a tokenizer (`no_forcing`)."""
        return []


def build_vocabulary(tokens: Sequence[bytes], special_ids: Sequence[int], eos_ids: Sequence[int]) -> LLTokenizer:
    """A vocabulary: the bytes of each token by its id, which of them are no text, and which end a sequence (at least
    one). Takes a tenth of a second for 50,000 tokens."""
    wrapped = TokenizerWrapper(_Tokens(tokens, special_ids, eos_ids))
    return LLTokenizer(wrapped, n_vocab=len(tokens), eos_token=list(eos_ids))


def compile_grammar(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of an output. Raises GrammarError, also for what the library only warns of."""
    _, complaints = LLMatcher.validate_grammar_with_warnings(grammar, vocabulary, limits=LIMITS)
    if complaints:
        raise GrammarError("; ".join(map(_reason, complaints)))
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=LIMITS)
    # Much is compiled when it is first needed, and some grammars show only then that they are too large.
    mask = matcher.compute_bitmask()
    if not matcher.is_error() and any(mask):
        return matcher
    error = _reason(matcher.get_error())
    raise GrammarError("no output matches it" if not error or error.startswith("NoExtension") else error)


def _reason(complaint: str) -> str:
    """A complaint of the library's in one line, without its picture of the grammar."""
    lines = [line.strip() for line in complaint.splitlines()]
    picture = next((number for number, line in enumerate(lines) if re.match(r"\d+ \| |<", line)), len(lines))
    return " ".join(line for line in lines[:picture] if line.strip("^ "))
