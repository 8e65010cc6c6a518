"""Spherical attention (2505.09326): weights z / |z| instead of a softmax, z = q k / sqrt(d)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TqaiError

EPS = 1e-12


def spherical_attention(q: Tensor, k: Tensor, v: Tensor, trained: bool = False) -> Tensor:
    """``o_i = sum_j z_ij v_j / sqrt(sum_j z_ij^2)`` of ``q [.., n, d]``, ``k [.., m, d]``, ``v [.., m, dv]``, exactly.

    Published as a streaming kernel over all pairs, but linear in z, so that ``q (K^T V) / sqrt(q (K^T K) q^T)`` is the same in
    O((n + m) d (d + dv)). fp32 inside. The scale of z cancels.

    It is no stand-in for softmax: on the minis, with the best gain for every head, its outputs have an NMSE of .42, where the
    mere mean of the values has .49. So it refuses unless ``trained=True`` says that the model was trained with it. What softmax
    models can use of it, its linear form for keys far away, is ``block_attention(.., far="linear")``. Raises ValueError otherwise
    and for unfit shapes.
    """
    if not trained:
        raise TqaiError(
            "spherical attention asked for a model that is not known to be trained with it: its outputs would have an NMSE of .42; give "
            "trained=True if it was, or block_attention(.., far='linear') for a softmax model"
        )
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise TqaiError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: all must be [.., tokens, d] with the dimensions before alike"
        )
    wide, k32 = q.float(), k.float()
    norm = (wide @ (k32.mT @ k32) * wide).sum(-1, keepdim=True).clamp_min(EPS).sqrt()
    return (wide @ (k32.mT @ v.float()) / norm).to(torch.result_type(q, v))
