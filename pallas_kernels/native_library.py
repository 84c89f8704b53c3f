"""Builds the C++ kernels of `native/` on first use, with the compiler the machine has, and keeps the result."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import jax.ffi
import jaxlib

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-w")
"""Contraction is off so that a product and a sum become one rounding only where the source says so."""
BUILD_TIMEOUT = 300.0
"""Seconds."""


class NativeBuildError(RuntimeError):
    """The kernels cannot be built or loaded here; the message says why in one line."""


def cache_folder() -> Path:
    """Where built libraries are kept: the user's own cache."""
    return Path("~/.cache/jaxserve/native").expanduser()


def build(folder: Path | None = None, compilers: tuple[str, ...] = COMPILERS) -> Path:
    """The built library, from the cache where it lies there.

    Args:
        folder: where libraries are kept; None takes `cache_folder()`.
        compilers: names to look for, in order.

    Raises:
        NativeBuildError: no compiler, or it failed.
    """
    compiler = next((found for name in compilers if (found := shutil.which(name))), None)
    folder = folder or cache_folder()
    library = folder / f"paged_attention-{_key(compiler)}.so"
    if library.exists():
        return library
    if compiler is None:
        raise NativeBuildError(f"none of {', '.join(compilers)} is on the path")
    started = time.monotonic()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / library.name
            _compile(compiler, built)
            # Whole or not there: another process may be building the same one.
            os.replace(built, library)
    except OSError as error:
        raise NativeBuildError(f"{folder}: {error}") from error
    log.info("built %s with %s in %.1f s", library.name, compiler, time.monotonic() - started)
    return library


@functools.cache
def register() -> str:
    """Builds, loads and registers the kernels with XLA, once a process. Gives the name of the custom call.

    Raises:
        NativeBuildError: the kernels cannot be built or loaded here.
    """
    name = "jaxserve_paged_attention"
    library = build()
    try:
        handler = ctypes.CDLL(str(library)).JaxservePagedAttention
    except (OSError, AttributeError) as error:
        raise NativeBuildError(f"{library.name}: {error}") from error
    jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    return name


def _compile(compiler: str, output: Path) -> None:
    command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCES / "paged_attention.cc"), "-o", str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise NativeBuildError(f"{compiler} took more than {BUILD_TIMEOUT:.0f} s") from error
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
        raise NativeBuildError(f"{compiler} failed with {done.returncode}: {complaint}")


def _key(compiler: str | None) -> str:
    """Tells apart what must not share a library: sources, jaxlib, flags, compiler and the processor."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    for part in (jaxlib.__version__, " ".join(FLAGS), str(compiler), _processor()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Model and instruction set extensions: -march=native depends on both."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
