"""Flux.1 and Flux.2: one call a step (distilled guidance) or two (true CFG); the time is given as sigma itself."""

from .families import Family

FAMILY = Family("flux", ("FluxTransformer2DModel", "Flux2Transformer2DModel"), ("transformer_blocks", "single_transformer_blocks"), 1.0)
