"""What a start shows: lines for a log, a live line for a person."""

import io

from jaxserve.commands.progress import ProgressDisplay


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(stream: io.StringIO) -> str:
    with ProgressDisplay(stream) as progress:
        progress("loading weights", 0.0)
        progress("loading weights", 0.5)
        progress("compiling", None)
        progress.finish("m is ready")
    return stream.getvalue()


def test_plain_output_has_two_lines_an_activity_and_no_control_characters():
    lines = show(io.StringIO()).splitlines()
    assert [line.split(" in ")[0].split(": ")[0] for line in lines] == [
        "loading weights ...",
        "loading weights",
        "compiling ...",
        "compiling",
        "m is ready",
    ]
    assert all(line.isprintable() for line in lines)


def test_a_terminal_has_one_line_with_a_bar_that_is_erased_at_the_end():
    text = show(Terminal())
    assert "loading weights [############............]  50%" in text
    assert text.count("\n") == 1
    assert text.split("\r\x1b[K")[-1].startswith("m is ready in ")


def test_a_start_that_fails_leaves_a_clean_line_behind():
    stream = Terminal()
    with ProgressDisplay(stream) as progress:
        progress("compiling", 0.3)
    assert stream.getvalue().endswith("\r\x1b[K")
