"""WAN 2.1 and 2.2: two calls a step; A14B switches to ``transformer_2`` on the way."""

from .base import Family

FAMILY = Family("wan", ("WanTransformer3DModel",), ("blocks",), 1000.0, tokens="patch_embedding", rope="rope")
