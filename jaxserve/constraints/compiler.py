"""Compiles the grammars of requests that wait for it, beside the step loop."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from jaxserve.core.messages import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

_KEPT = 64
"""Compiled grammars that are kept for requests to come: tens of KiB each, most of them."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A command to the loop: a request's grammar is compiled, or cannot be."""

    handle: int
    matcher: "LLMatcher | Exception"


class GrammarCompiler:
    """A thread that compiles, outside the GIL, and the grammars that it has compiled.

    The front had each of them compiled once before it accepted the request, within limits, so that none takes long.
    The thread is there from the start and not of a pool: once a program's main thread has ended, while others may still
    use the engine, no thread is started and no pool takes anything.

    Args:
        report: given each result, on that thread.
    """

    def __init__(self, report: Callable[[Compiled], None]):
        self._report = report
        self._asked: SimpleQueue[Vocabulary | tuple[int, str] | None] = SimpleQueue()
        self._is_closed = False
        self._compile: Callable[[str], LLMatcher] | Exception = RuntimeError("the vocabulary comes first")
        """Gives the same matcher for the same grammar, of which copies are given out. Used on the thread alone."""
        self._thread = threading.Thread(target=self._run, name="jaxserve-grammars", daemon=True)
        self._thread.start()

    def learn(self, vocabulary: Vocabulary) -> None:
        """Takes in the model's vocabulary, before the first grammar. Does not wait."""
        self._asked.put(vocabulary)

    def compile(self, handle: int, grammar: str) -> None:
        """Has a grammar compiled for a request. Does not wait."""
        self._asked.put((handle, grammar))

    def close(self) -> None:
        """Ends the thread, after what it is doing, and waits for that: it must not outlive the interpreter."""
        self._is_closed = True
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None and not self._is_closed:
            if isinstance(asked, Vocabulary):
                self._learn(asked)
            else:
                handle, grammar = asked
                self._report(Compiled(handle, self._matcher(grammar)))

    def _learn(self, vocabulary: Vocabulary) -> None:
        try:
            # Only here is llguidance needed.
            from jaxserve.constraints.matching import build_vocabulary, compile_grammar

            known = build_vocabulary(vocabulary.tokens, vocabulary.special_ids, vocabulary.eos_ids)
            self._compile = lru_cache(_KEPT)(partial(compile_grammar, known))
        except Exception as error:  # who needs it is told
            self._compile = error

    def _matcher(self, grammar: str) -> "LLMatcher | Exception":
        if isinstance(self._compile, Exception):
            return self._compile
        try:
            return self._compile(grammar).deep_copy()
        except Exception as error:
            return error
