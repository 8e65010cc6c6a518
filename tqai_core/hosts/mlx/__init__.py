"""mlx-lm: a prompt cache of packed keys and values, read by mlx's own quantised kernels.

>>> from tqai_core.hosts.mlx import make_prompt_cache             # doctest: +SKIP
>>> cache = make_prompt_cache(model, tqai.Config(level="kv"))        # doctest: +SKIP
>>> mlx_lm.generate(model, tokenizer, prompt, prompt_cache=cache)    # doctest: +SKIP

As in :mod:`tqai_core.kv`, the first tokens and a recent window stay exact, keys are stored as (k - mean) / scale once 256
tokens are there, and each token is packed once. Exact at any time are the chunk that is being read, the window, and at first
the tokens that the statistics wait for; never the whole prompt.
"""

from .attach import load_prompt_cache, make_prompt_cache
from .cache import PackedKVCache

__all__ = ["PackedKVCache", "load_prompt_cache", "make_prompt_cache"]
