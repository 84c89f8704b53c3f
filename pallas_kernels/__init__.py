"""Attention over a paged KV cache: one interface, one implementation or more behind it for each platform."""

from pallas_kernels.interface import Attended, AttentionNeeds, LayerCache, PagedAttention
from pallas_kernels.platforms import IMPLEMENTATIONS, select

__all__ = ["IMPLEMENTATIONS", "Attended", "AttentionNeeds", "LayerCache", "PagedAttention", "select"]
