"""The tensors for packed caches in a file of ``tqai calibrate`` (:mod:`kv.calibrated` reads them).

``cache_damage fp32 [layers, 2, 6]``: the predicted loss of the output from keys (0) and values (1) coded by cache rows of 2, 3, 4, 5, 6
and 8 bits. ``cache_shape_k``, ``cache_metric_k fp16 [layers, heads, d, d]``: matrices that shape the error of keys (:mod:`codecs.shaped`),
where they won. Older files have no metric, and may have ``cache_shape_v`` of values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..codecs.rows import BITS
from ..errors import TqaiError
from ..files import check_tensor

AGAIN = "calibrate again"
DAMAGE, SHAPES, METRIC = "cache_damage", ("cache_shape_k", "cache_shape_v"), "cache_metric_k"


def checked_tables(found: Mapping[str, Tensor], units: tuple[int, int], path: str) -> dict[str, Tensor]:
    """The tensors for caches of a file, checked; none where the file is older. ``units``: layers and heads."""
    if DAMAGE not in found:
        return {}
    try:
        out = {DAMAGE: check_tensor(found, DAMAGE, (units[0], 2, len(BITS)), (torch.float32,), AGAIN)}
        if not bool(((out[DAMAGE] >= 0) & (out[DAMAGE] < 1e30)).all()):
            raise TqaiError(f"field {DAMAGE!r} has numbers out of range: {AGAIN}")
        for name in SHAPES:
            if name in found:
                x = check_tensor(found, name, (*units, None, None), (torch.float16,), AGAIN)
                if x.shape[2] != x.shape[3] or not bool((torch.linalg.cond(x.float()) < 1e5).all()):
                    raise TqaiError(f"field {name!r} has matrices without an inverse: {AGAIN}")
                out[name] = x
        if METRIC in found:
            x = check_tensor(found, METRIC, (*units, None, None), (torch.float16,), AGAIN)
            if SHAPES[0] not in out or x.shape != out[SHAPES[0]].shape or not bool((torch.linalg.eigvalsh(x.float()) > 1e-4).all()):
                raise TqaiError(f"field {METRIC!r} has no positive matrices that go with {SHAPES[0]!r}: {AGAIN}")
            out[METRIC] = x
    except TqaiError as error:
        raise TqaiError(f"{path}: {error}") from None
    return out
