"""`jaxserve convert`: any checkpoint to the native format."""

import time
from pathlib import Path

from jaxserve.commands.progress import ProgressDisplay
from jaxserve.commands.start import model_errors
from jaxserve.config import Quantization


def convert_checkpoint(source: str, folder: str, dtype: str, quantization: Quantization) -> str:
    """Writes the folder, showing progress; returns a line that says what was written. Raises CommandError."""
    began = time.monotonic()
    with ProgressDisplay() as progress:
        progress("starting", None)
        with model_errors():
            from jaxserve.checkpoints.loading import convert

            convert(source, folder, dtype, quantization, progress)
    size = sum(file.stat().st_size for file in Path(folder).expanduser().rglob("*") if file.is_file())
    kind = dtype if quantization == "none" else f"{dtype}, {quantization} weights"
    return f"wrote {folder}: {kind}, {size / 1e6:.1f} MB, in {time.monotonic() - began:.1f} s"
