"""Compiles grammars and tells what is wrong with them: a program of its own, run by `ConstraintChecker`.

It reads lines of JSON: first `tokens` (bytes as latin-1), `special_ids`, `eos_ids`, `cpu_seconds` and `memory_bytes`,
then grammars, each a string. It says null once it is ready, and answers each grammar by a line: null, or why no output
can be held to it. When the processor time of a grammar is used up, the kernel ends the program (SIGPROF).
"""

import json
import resource
import signal
import sys

from llguidance import LLTokenizer

from jaxserve.constraints.matching import GrammarError, build_vocabulary, compile_grammar
from jaxserve.request_errors import clipped


def complaint(vocabulary: LLTokenizer, grammar: str) -> str | None:
    """Why a grammar cannot be held to; None if it can."""
    try:
        compile_grammar(vocabulary, grammar)
    except GrammarError as error:
        return clipped(str(error))  # it may quote all of the grammar, and is remembered
    return None


def main() -> None:
    """Answers lines until there are no more."""
    # What a terminal or a service manager sends to every process is for the server, which ends this program.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # would be inherited where the server ignores it
    lines = sys.stdin.buffer
    settings = json.loads(lines.readline())
    tokens = [token.encode("latin-1") for token in settings["tokens"]]
    vocabulary = build_vocabulary(tokens, settings["special_ids"], settings["eos_ids"])
    resource.setrlimit(resource.RLIMIT_AS, (settings["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _say("null")
    for line in lines:
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_seconds"])
        reply = json.dumps(complaint(vocabulary, json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(reply)


def _say(line: str) -> None:
    sys.stdout.buffer.write(line.encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
