"""Compiles the C++ kernels in `native/` on first use and registers them as XLA FFI targets.

All of them become one shared object, built for this machine's processor and kept in the user's cache folder under a
hash of everything it depends on, so that a changed source, compiler, jaxlib or processor never meets an old build.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path

import jax
from jaxlib import version as jaxlib_version

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-ffp-contract=off", "-w")
"""Contraction is off so that a product and a sum become one rounding only where the source says so."""
_COMPILE_SECONDS = 120.0
_VERSION_SECONDS = 30.0


class NativeUnavailable(RuntimeError):
    """The native kernels cannot be built or loaded here; the message says why."""


@cache
def _loaded(arch: str) -> ctypes.CDLL | NativeUnavailable:
    try:
        return ctypes.CDLL(str(build(arch)))
    except NativeUnavailable as reason:
        return reason
    except OSError as error:
        return NativeUnavailable(f"the native kernels do not load: {error}")


def load(arch: str = "native") -> ctypes.CDLL:
    """The kernels' shared object, compiled if need be; raises NativeUnavailable, at once on a second try.

    Args:
        arch: the processor to compile for, as the compiler's -march (-mcpu on ARM); tests name older ones.
    """
    library = _loaded(arch)
    if isinstance(library, NativeUnavailable):
        raise library
    return library


def available(arch: str = "native") -> bool:
    """Whether the kernels can be built and loaded here; compiles them the first time."""
    return not isinstance(_loaded(arch), NativeUnavailable)


@cache
def register(symbol: str, arch: str = "native") -> str:
    """Registers an exported FFI handler with XLA on CPU and returns its target name. Raises NativeUnavailable."""
    target = f"jaxserve.{symbol}" if arch == "native" else f"jaxserve.{symbol}.{arch}"
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(load(arch), symbol)), platform="cpu")
    return target


def build(arch: str = "native", folder: Path | None = None, compilers: Sequence[str] = COMPILERS) -> Path:
    """The shared object's path: from the cache, or compiled now. Raises NativeUnavailable with the compiler's words.

    Args:
        arch: as for `load`.
        folder: of the cache; None takes the user's.
        compilers: names to look for, in order.
    """
    compiler = next(filter(None, map(shutil.which, compilers)), None)
    if compiler is None:
        raise NativeUnavailable(f"no C++ compiler found; looked for {', '.join(compilers)}")
    arm = platform.machine().lower() in ("aarch64", "arm64")
    command = [compiler, *_FLAGS, f"-mcpu={arch}" if arm else f"-march={arch}", f"-I{jax.ffi.include_dir()}"]
    name = f"kernels-{_key(command)}.so"
    folder = _cache_folder(name) if folder is None else folder
    library = folder / name
    if not library.exists():
        started = time.monotonic()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _compile(command, library)
        except OSError as error:
            raise NativeUnavailable(f"{folder}: {error}") from error
        log.info("built %s with %s in %.1f s", library.name, compiler, time.monotonic() - started)
    return library


def _compile(command: Sequence[str], library: Path) -> None:
    """Compiles each source in a process of its own, links, and renames into place: another process may do the same."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        # The longest first, so that the compilers end together.
        sources = sorted(SOURCES.glob("*.cc"), key=lambda source: -source.stat().st_size)
        objects = [f"{scratch}/{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            jobs = [
                pool.submit(_run, [*command, "-c", str(source), "-o", made])
                for source, made in zip(sources, objects, strict=True)
            ]
            for job in jobs:
                job.result()
        linked = f"{scratch}/kernels.so"
        _run([*command, "-shared", *objects, "-o", linked])
        with open(linked, "rb") as whole:
            os.fsync(whole.fileno())  # a machine that stops now must not keep the name of a part: loading it is a crash
        os.replace(linked, library)


def _run(command: Sequence[str]) -> None:
    done = _ended(command, _COMPILE_SECONDS)
    if done.returncode:
        raise NativeUnavailable(f"the native kernels do not compile: {done.stderr[-2000:]}")


def _ended(command: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeUnavailable(f"the C++ compiler does not run: {error}") from error


def _key(command: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for part in (*command, jaxlib_version.__version__, _compiler_version(command[0]), _processor()):
        digest.update(part.encode() + b"\0")
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in (".cc", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


@cache
def _compiler_version(compiler: str) -> str:
    return _ended([compiler, "--version"], _VERSION_SECONDS).stdout


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder(library: str) -> Path:
    """The user's own folder, or a temporary one where that lacks the library and cannot be written."""
    try:
        folder = Path.home() / ".cache" / "jaxserve" / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (folder / library).exists() or os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return _temporary_folder()


def _temporary_folder() -> Path:
    """The same one at each start of this user, unless somebody else could write there: what lies there is run."""
    folder = Path(tempfile.gettempdir()) / f"jaxserve-native-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()  # of a link, what it is itself
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    return Path(tempfile.mkdtemp(prefix="jaxserve-native-"))
