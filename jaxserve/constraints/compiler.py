"""Compiles the grammars of requests that wait for it, beside the step loop."""

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.core.messages import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT = 64
"""Compiled grammars that are kept for requests to come: tens of KiB each, most of them."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """A command to the loop: a request's grammar is compiled, or, if the future has an exception, cannot be."""

    handle: int
    matcher: "Future[LLMatcher]"


class GrammarCompiler:
    """A thread that compiles, outside the GIL, and the grammars that it has compiled.

    The front had each of them compiled once before it accepted the request, within limits, so that none takes long.

    Args:
        report: given each result, on that thread.
    """

    def __init__(self, report: Callable[[Compiled], None]):
        self._report = report
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jaxserve-grammars")
        self._vocabulary: LLTokenizer | None = None
        self._grammars: OrderedDict[str, LLMatcher] = OrderedDict()
        """As compiled; what is given out is a copy. Used on the thread alone."""

    def learn(self, vocabulary: Vocabulary) -> None:
        """Takes in the model's vocabulary, before the first grammar. Does not wait."""
        self._thread.submit(self._learn, vocabulary)

    def compile(self, handle: int, grammar: str) -> None:
        """Has a grammar compiled for a request. Does not wait."""
        future = self._thread.submit(self._matcher, grammar)
        future.add_done_callback(lambda done: self._report(Compiled(handle, done)))

    def close(self) -> None:
        """Ends the thread, after what it is doing."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _learn(self, vocabulary: Vocabulary) -> None:
        from jaxserve.constraints.matching import build_vocabulary  # only here is llguidance needed

        self._vocabulary = build_vocabulary(vocabulary.tokens, vocabulary.special_ids, vocabulary.eos_ids)

    def _matcher(self, grammar: str) -> "LLMatcher":
        from jaxserve.constraints.matching import compile_grammar

        assert self._vocabulary is not None, "the vocabulary comes first"
        matcher = self._grammars.pop(grammar, None) or compile_grammar(self._vocabulary, grammar)
        self._grammars[grammar] = matcher
        if len(self._grammars) > _KEPT:
            self._grammars.popitem(last=False)
        return matcher.deep_copy()
