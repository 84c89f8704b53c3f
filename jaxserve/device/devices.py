"""What accelerators can do, as their makers state it: for plans made before there is one.

Memory, bandwidth and dense rates are those of one JAX device. Sources: Google Cloud's TPU documentation, one page a
generation (https://cloud.google.com/tpu/docs/v4, and likewise v5e, v5p, v6e, tpu7x; of the last, int8 is given the rate
of its float8), and NVIDIA's data sheets of H100 SXM, H200 SXM, A100 80GB SXM, L4, L40S and HGX B200. Vendors' rates
with sparsity are halved.
"""

import re
from dataclasses import dataclass

GPU_MEMORY_FRACTION = 0.92
"""Share of a GPU's memory that an engine's own process takes for JAX's allocator; JAX itself would take 0.75."""


@dataclass(frozen=True)
class Device:
    """One JAX device of a kind."""

    kind: str
    """Its name in `DEVICES`."""
    platform: str
    """`tpu` or `cuda`, as `pallas_kernels.select` calls it."""
    memory: int
    """Bytes that programs can have: on TPUs the high-bandwidth memory less what the runtime keeps."""
    bandwidth: float
    """Bytes a second."""
    flops: float
    """Dense bfloat16 operations a second, a multiplication and an addition being two."""
    int8_ops: float
    """Dense int8 operations a second."""
    topology: str | None = None
    """The smallest topology of it that a program can be compiled for ahead of time, in JAX's words; None: untried."""

    @property
    def jax_kind(self) -> str:
        """What identifies it in `jax.Device.device_kind`."""
        return self.kind.upper()


def _tpu(kind: str, gib: float, gigabytes_a_second: float, teraflops: float, int8: float, topology: str) -> Device:
    return Device(kind, "tpu", int(gib * 2**30), gigabytes_a_second * 1e9, teraflops * 1e12, int8 * 1e12, topology)


def _gpu(
    kind: str, gigabytes: float, gigabytes_a_second: float, teraflops: float, int8: float, topology: str | None = None
) -> Device:
    memory = int(gigabytes * 1e9 * GPU_MEMORY_FRACTION)
    return Device(kind, "cuda", memory, gigabytes_a_second * 1e9, teraflops * 1e12, int8 * 1e12, topology)


DEVICES: dict[str, Device] = {
    device.kind: device
    for device in (
        _tpu("v4", 31.25, 1228, 275, 275, "v4:2x2x1"),
        _tpu("v5e", 15.75, 819, 197, 393, "v5e:2x2"),
        _tpu("v5p", 94.75, 2765, 459, 918, "v5p:2x2x1"),
        _tpu("v6e", 31.25, 1638, 918, 1836, "v6e:2x2"),
        # A chip has 192 GB, 7,380 GB/s and 2,307 TFLOP/s (4,614 in float8), and is two devices.
        _tpu("tpu7x", 94.75, 3690, 1153, 2307, "tpu7x:2x2x1"),
        _gpu("a100", 80, 2039, 312, 624),
        _gpu("l4", 24, 300, 121, 242),
        _gpu("l40s", 48, 864, 362, 733),
        _gpu("h100", 80, 3350, 989, 1979, "1x1x1"),
        _gpu("h200", 141, 4800, 989, 1979),
        _gpu("b200", 180, 7700, 2250, 4500),
    )
}
"""By name. A TPU v4 or v5p device is a chip, a v5e or v6e device too; a tpu7x device is half a chip."""


def parse_device(text: str) -> tuple[Device, int]:
    """A kind and a number of devices: `v6e-4` is four v6e, `h100` one H100. Raises ValueError, with the kinds."""
    match = re.fullmatch(r"([a-z0-9]+?)(?:-(\d{1,4}))?", text.lower())
    if match is None or match[1] not in DEVICES or int(match[2] or 1) < 1:
        raise ValueError(f"device: must be a kind and a number, as v6e-4, of {', '.join(DEVICES)}; got {text!r}")
    return DEVICES[match[1]], int(match[2] or 1)
