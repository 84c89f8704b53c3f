"""Token ids to text as they come, and the stop strings that end it."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.tokenizing.stop_strings import StopStrings
from jaxserve.tokenizing.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some tokens add to a text."""

    text: str
    matched_stop: str | None
    """The stop string that is now complete; the text has ended."""
    tokens_used: int
    """How many of the tokens are part of the sequence: all, or those up to the one that completed the match."""


class TextStream:
    """The text of one sequence. Pushed and flushed, it adds up to `Tokenizer.decode` of all ids, up to a match, but for
    a first space that is kept.

    Bytes are held back until their UTF-8 character is complete, and text while it may be the beginning of a stop
    string. A match ends the text: what follows adds nothing. The match that is complete first wins, of those that end
    together the longest. Not thread-safe.

    Args:
        tokenizer: the model's.
        stop: strings that end the text.
        include_stop: the text ends with the stop string, not before it.
        min_tokens: a stop string that is complete before this many tokens ends nothing.
        keeps_first_space: a space at the beginning is the text's own: it goes on after a prompt, which ends in a word
            perhaps, or a constraint was matched with it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        keeps_first_space: bool = False,
    ):
        self._bytes = tokenizer.text_bytes
        self._decoder = _UTF8("replace")
        self._at_start = tokenizer.strips_leading_space and not keeps_first_space
        self._stops = StopStrings(stop) if stop else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._tokens = 0
        self._held = ""
        self._matched: str | None = None

    def push(self, token_ids: Sequence[int]) -> TextDelta:
        """Adds tokens, special ones among them, which add no text."""
        if self._stops is None:
            return TextDelta(self._decode(b"".join([self._bytes[id] for id in token_ids])), None, len(token_ids))
        if self._matched is not None:
            return TextDelta("", self._matched, 0)
        pieces = [self._held]
        for used, id in enumerate(token_ids, 1):
            self._tokens += 1
            piece = self._decode(self._bytes[id])
            match = self._stops.search(piece, armed=self._tokens >= self._min_tokens)
            if match is not None:
                pieces.append(piece[: match.end])
                text = "".join(pieces)
                self._matched = match.stop
                return TextDelta(text if self._include_stop else text[: -len(match.stop)], match.stop, used)
            pieces.append(piece)
        text = "".join(pieces)
        # A text that includes its stop string need not wait for one.
        shown = len(text) - (0 if self._include_stop else self._stops.held)
        self._held = text[shown:]
        return TextDelta(text[:shown], None, len(token_ids))

    def flush(self) -> str:
        """What was held back, when no more tokens come. An incomplete character becomes one U+FFFD."""
        if self._matched is not None:
            return ""
        text = self._held + self._decode(b"", final=True)
        self._held = ""
        return text

    def _decode(self, data: bytes, final: bool = False) -> str:
        text = self._decoder.decode(data, final)
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix(" ")
        return text
