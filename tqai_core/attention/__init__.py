"""Attention kernels of our own: torch first."""

from .sparse import block_attention
from .spherical import spherical_attention

__all__ = ["block_attention", "spherical_attention"]
