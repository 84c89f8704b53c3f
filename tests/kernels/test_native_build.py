"""Building the native kernels: once, whole, and with the reason where it cannot be done."""

import os
import tempfile
from pathlib import Path

import pytest

from pallas_kernels.native_build import SOURCES, NativeUnavailable, build


def compiler(folder: Path, script: str) -> str:
    """A program that stands for a compiler."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# Writes the file after -o, and a line for each run.
WORKS = """echo run >> "$(dirname "$0")/runs"
while [ "$1" != -o ] && [ $# -gt 0 ]; do shift; done
[ $# -eq 0 ] || echo built > "$2"
"""


def test_each_source_is_compiled_once_and_the_library_kept(tmp_path):
    program = compiler(tmp_path, WORKS)
    library = build(folder=tmp_path / "cache", compilers=(program,))
    assert library.read_text() == "built\n"
    # Each source, the link and the question for the version.
    runs = len((tmp_path / "runs").read_text().splitlines())
    assert runs == len(list(SOURCES.glob("*.cc"))) + 2
    assert build(folder=tmp_path / "cache", compilers=(program,)) == library
    assert len((tmp_path / "runs").read_text().splitlines()) == runs
    assert list((tmp_path / "cache").iterdir()) == [library]


def test_a_library_that_is_there_is_used_where_its_folder_is_read_only(tmp_path, monkeypatch):
    """As in a container whose image was started once while it was made."""
    program = compiler(tmp_path, WORKS)
    monkeypatch.setenv("HOME", str(tmp_path))
    library = build(compilers=(program,))
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and allowed(path, mode))
    assert build(compilers=(program,)) == library


def test_without_a_home_a_library_is_built_once_and_not_where_others_write(tmp_path, monkeypatch):
    program = compiler(tmp_path, WORKS)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    library = build(compilers=(program,))
    assert build(compilers=(program,)) == library
    for mode in (0o770, 0o707):
        library.parent.chmod(mode)
        assert build(compilers=(program,)).parent not in (library.parent, tmp_path)
    moved = library.parent.rename(tmp_path / "moved")
    moved.chmod(0o700)
    library.parent.symlink_to(moved)
    assert build(compilers=(program,)).parent not in (library.parent, moved)


def test_a_compiler_that_does_not_tell_its_version_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("pallas_kernels.native_build._VERSION_SECONDS", 0.1)
    with pytest.raises(NativeUnavailable, match=r"does not run: .* timed out"):
        build(folder=tmp_path, compilers=(compiler(tmp_path, "exec sleep 60"),))


def test_processors_do_not_share_a_library(tmp_path):
    program = compiler(tmp_path, WORKS)
    assert build("x86-64", tmp_path, (program,)) != build("native", tmp_path, (program,))


def test_without_a_compiler_the_reason_names_what_was_looked_for(tmp_path):
    with pytest.raises(NativeUnavailable, match="no-such-compiler"):
        build(folder=tmp_path, compilers=("no-such-compiler",))


def test_a_failing_compiler_leaves_nothing_and_its_words_are_kept(tmp_path):
    program = compiler(tmp_path, "echo something is wrong >&2; exit 1")
    with pytest.raises(NativeUnavailable, match="something is wrong"):
        build(folder=tmp_path / "cache", compilers=(program,))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NativeUnavailable, match="file"):
        build(folder=tmp_path / "file" / "cache", compilers=(compiler(tmp_path, WORKS),))
