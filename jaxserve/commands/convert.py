"""`jaxserve convert`: any checkpoint to the native format."""

import os
import time
from pathlib import Path

from jaxserve.commands.progress import ProgressDisplay
from jaxserve.commands.start import CommandError, ended_by_interrupts, model_errors
from jaxserve.config import Quantization
from jaxserve.paths import user_path


def convert_checkpoint(source: str, folder: str, dtype: str, quantization: Quantization) -> str:
    """Writes the folder, showing progress; returns a line that says what was written. Raises CommandError."""
    from jaxserve.checkpoints.native_folder import remove_partial

    began = time.monotonic()
    progress = ProgressDisplay()

    def clean_up() -> None:
        progress.clear()
        remove_partial(user_path(folder))

    with progress, ended_by_interrupts(clean_up):
        progress("starting", None)
        with model_errors():
            _check_place(user_path(folder))
            from jaxserve.checkpoints.loading import convert

            convert(source, folder, dtype, quantization, progress)
    size = sum(file.stat().st_size for file in user_path(folder).rglob("*") if file.is_file())
    kind = dtype if quantization == "none" else f"{dtype}, {quantization} weights"
    return f"wrote {folder}: {kind}, {size / 1e6:.1f} MB, in {time.monotonic() - began:.1f} s"


def _check_place(folder: Path) -> None:
    """Finds before anything is loaded that a folder cannot be made. Raises CommandError or OSError."""
    place = folder.absolute()
    parent = next(parent for parent in (place, *place.parents) if parent.exists())
    if not parent.is_dir():
        raise CommandError(f"{folder}: cannot be made: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CommandError(f"{folder}: cannot be made: {parent} cannot be written")
