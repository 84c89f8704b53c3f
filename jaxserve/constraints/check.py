"""Whether an output can be held to a constraint, found out before the request is accepted, where it can do no harm."""

import json
import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec

from jaxserve.constraints.grammar import grammar_of
from jaxserve.core.messages import Vocabulary
from jaxserve.limited_process import LimitedProcess, LimitReached
from jaxserve.request import Constraint
from jaxserve.request_errors import EngineUnavailable, InvalidRequest

_PROGRAM = ("-m", "jaxserve.constraints.check_process")
_VERDICTS = 1024
"""Constraints whose verdict is remembered."""


@dataclass(frozen=True)
class ConstraintLimits:
    """What a constraint may take."""

    max_bytes: int
    """Of its text, in UTF-8."""
    cpu_seconds: float
    """Seconds of processor time to compile it: a busy machine does not count."""
    memory_bytes: int = 1 << 30
    """Address space of the process that compiles it, the interpreter and the vocabulary included."""


class ConstraintChecker:
    """Turns constraints into grammars that were compiled once, in a process of its own. Thread-safe.

    A regular expression can take forever and a grammar all memory; the kernel ends the process that tries. It is
    started with the first constraint, in some tenths of a second; a warm check takes a millisecond.

    Args:
        vocabulary: the model's.
        limits: beyond which a constraint is refused.
    """

    def __init__(self, vocabulary: Vocabulary, limits: ConstraintLimits):
        self._max_bytes = limits.max_bytes
        self._process = LimitedProcess(
            _PROGRAM,
            {
                "tokens": [token.decode("latin-1") for token in vocabulary.tokens],
                "special_ids": vocabulary.special_ids,
                "eos_ids": vocabulary.eos_ids,
                "cpu_seconds": limits.cpu_seconds,
                "memory_bytes": limits.memory_bytes,
            },
        )
        self._lock = threading.Lock()
        self._refusals: OrderedDict[bytes, str | None] = OrderedDict()

    def grammar(self, constraint: Constraint) -> str:
        """The grammar that the core holds the output to. Raises InvalidRequest naming the field and why, and
        EngineUnavailable where that cannot be found out now."""
        if find_spec("llguidance") is None:
            raise InvalidRequest(constraint.kind, "constraints need the package llguidance, which this host lacks")
        grammar = grammar_of(constraint, self._max_bytes)
        digest = blake2b(grammar.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        with self._lock:
            known = digest in self._refusals
            refusal = self._refusals.get(digest)
        if not known:
            refusal = self._compile(grammar)
            with self._lock:
                self._refusals[digest] = refusal
                if len(self._refusals) > _VERDICTS:
                    self._refusals.popitem(last=False)
        if refusal is not None:
            # Only a client's own grammar has lines and columns that mean something to it.
            place = "" if constraint.grammar is not None else r"^at \d+\(\d+\): "
            raise InvalidRequest(constraint.kind, re.sub(place, "", refusal))
        return grammar

    def stop(self) -> None:
        """Ends the process; the next constraint starts it again."""
        self._process.stop()

    def _compile(self, grammar: str) -> str | None:
        """Why a grammar is refused; None if it is not. Raises EngineUnavailable."""
        try:
            try:
                return self._process.ask(json.dumps(grammar))
            except EngineUnavailable:  # once is perhaps another's doing: a full memory, a machine that stood still
                return self._process.ask(json.dumps(grammar))
        except LimitReached as limit:
            return f"cannot be compiled: {limit}"
