"""Paged attention for TPUs, in Pallas (Mosaic)."""

from pallas_kernels.mosaic_tpu.implementation import MosaicTpuPagedAttention

__all__ = ["MosaicTpuPagedAttention"]
