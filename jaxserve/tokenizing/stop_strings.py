"""Search for several strings at once in text that comes in pieces (Aho and Corasick, 1975)."""

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopMatch:
    """A stop string that was found."""

    stop: str
    end: int
    """Characters of the latest piece up to the end of the match."""


class StopStrings:
    """The state of a search. The match that is complete first wins, and of those that end together the longest.

    That depends on the text alone, not on how it was cut into pieces. Each character is looked at once; a piece without
    the first character of any string costs one regular expression.
    """

    def __init__(self, stops: Sequence[str]):
        """`stops` are one or more strings, none empty."""
        # A node is a beginning of some string: 0 is the empty one.
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._stop: list[str | None] = [None]
        for stop in stops:
            node = 0
            for depth, char in enumerate(stop, 1):
                node = self._next[node].setdefault(char, len(self._next))
                if node == len(self._next):
                    self._next.append({})
                    self._depth.append(depth)
                    self._stop.append(None)
            self._stop[node] = stop
        self._suffix = self._link()
        self._first = re.compile("|".join(re.escape(char) for char in self._next[0]))
        self._node = 0

    def _link(self) -> list[int]:
        """For each node, the longest proper suffix that is a node as well; and stop strings that end inside others."""
        suffix = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                candidate = suffix[node]
                while candidate and char not in self._next[candidate]:
                    candidate = suffix[candidate]
                suffix[child] = self._next[candidate].get(char, 0)
                queue.append(child)
            if self._stop[node] is None:
                self._stop[node] = self._stop[suffix[node]]
        return suffix

    @property
    def held(self) -> int:
        """Characters at the end of the text so far that may turn out to begin a match."""
        return self._depth[self._node]

    def search(self, piece: str, armed: bool = True) -> StopMatch | None:
        """Goes on with the next piece of the text, up to its end or to a match. While not armed, none matches."""
        node, position = self._node, 0
        while position < len(piece):
            if node == 0:
                first = self._first.search(piece, position)
                if first is None:
                    break
                position = first.start()
            char = piece[position]
            position += 1
            while node and char not in self._next[node]:
                node = self._suffix[node]
            node = self._next[node].get(char, 0)
            stop = self._stop[node]
            if stop is not None and armed:
                self._node = 0
                return StopMatch(stop, position)
            while not self._next[node]:
                node = self._suffix[node]  # nothing begins with this string but itself
        self._node = node
        return None
