"""Compiles grammars and tells what is wrong with them: a program of its own, run by `ConstraintChecker`.

The settings are `tokens` (bytes as latin-1), `special_ids`, `eos_ids` and those of `answer_lines`. A grammar is a
string; its answer is null, or why no output can be held to it.
"""

from collections.abc import Callable
from typing import Any

from jaxserve.constraints.matching import GrammarError, build_vocabulary, compile_grammar
from jaxserve.limited_program import answer_lines
from jaxserve.request_errors import clipped


def checker(settings: dict[str, Any]) -> Callable[[str], str | None]:
    """Says why a grammar cannot be held to; None if it can."""
    tokens = [token.encode("latin-1") for token in settings["tokens"]]
    vocabulary = build_vocabulary(tokens, settings["special_ids"], settings["eos_ids"])

    def complaint(grammar: str) -> str | None:
        try:
            compile_grammar(vocabulary, grammar)
        except GrammarError as error:
            return clipped(str(error))  # it may quote all of the grammar, and is remembered
        return None

    return complaint


if __name__ == "__main__":
    answer_lines(checker)
