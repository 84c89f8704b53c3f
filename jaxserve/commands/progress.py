"""What an engine is doing while it starts, on standard error: a live line on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

_BAR = 24
"""Characters of the bar."""
_ERASE = "\r\x1b[K"


class ProgressDisplay:
    """A ProgressCallback that shows what it is told; a context manager that clears up.

    Elsewhere than on a terminal each activity gives two lines: when it begins, and how long it took.
    """

    def __init__(self, stream: TextIO | None = None):
        """`stream`: None takes standard error."""
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._began = self._since = time.monotonic()
        self._what: str | None = None

    def __call__(self, what: str, fraction: float | None) -> None:
        """Shows what is being done, and the fraction of it, 0..1, where one is known."""
        if what != self._what:
            self._end_activity()
            self._what, self._since = what, time.monotonic()
            if not self._live:
                self._write(f"{what} ...\n")
        if self._live:
            self._write(f"{_ERASE}{what} {_bar(fraction)} {time.monotonic() - self._since:.1f} s")

    def _end_activity(self) -> None:
        if self._what is not None and not self._live:
            self._write(f"{self._what}: {time.monotonic() - self._since:.1f} s\n")
        self._what = None

    def finish(self, message: str) -> None:
        """Ends the display with one line: the message and the seconds since it began."""
        self._end_activity()
        self._write(f"{_ERASE if self._live else ''}{message} in {time.monotonic() - self._began:.1f} s\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Takes the live line away, if there is one."""
        if self._live and self._what is not None:
            self._write(_ERASE)
        self._what = None

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _bar(fraction: float | None) -> str:
    if fraction is None:
        return "..."
    full = round(_BAR * fraction)
    return f"[{'#' * full}{'.' * (_BAR - full)}] {fraction:4.0%}"
