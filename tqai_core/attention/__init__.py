"""Attention kernels of our own: torch first."""

from .sparse import block_attention

__all__ = ["block_attention"]
