"""Stable Diffusion 3 and 3.5: guidance is one batch of [uncond; cond]."""

from .base import Family

FAMILY = Family("sd3", ("SD3Transformer2DModel",), ("transformer_blocks",), 1000.0, tokens="pos_embed")
