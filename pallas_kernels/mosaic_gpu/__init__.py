"""Paged attention for Hopper GPUs, in Mosaic GPU: the copy engine, wgmma and warp specialisation."""

from pallas_kernels.mosaic_gpu.attention import MosaicGpuPagedAttention

__all__ = ["MosaicGpuPagedAttention"]
