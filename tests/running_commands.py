"""Commands that are run: how long one may take, and what one that cannot run leaves."""

import pytest

from jaxserve.cli import main

PATIENCE = 300.0
"""Seconds after which a process hangs; nothing is asserted to be fast by it."""


def failure(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line that a command which cannot run leaves, after its progress."""
    assert main(list(command)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    errors = [text for text in captured.err.splitlines() if text.startswith("jaxserve: error: ")]
    assert len(errors) == 1
    assert "Traceback" not in captured.err
    return errors[0]
