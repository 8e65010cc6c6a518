"""Spherical attention (2505.09326): weights z / |z| instead of a softmax, z = q k / sqrt(d)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import TqaiError

EPS = 1e-12


def spherical_attention(q: Tensor, k: Tensor, v: Tensor, trained: bool = False) -> Tensor:
    """``o_i = sum_j z_ij v_j / sqrt(sum_j z_ij^2)`` of ``q [.., n, d]``, ``k [.., m, d]``, ``v [.., m, dv]``, exactly, fp32 inside.

    The paper computes all pairs. The form is linear in z, so ``q (K^T V) / sqrt(q (K^T K) q^T)`` gives the same in
    O((n + m) d (d + dv)); the scale of z cancels. It does not replace a softmax: on the minis, with the best gain for every head, its
    outputs are hardly better than the mean of the values alone. So it raises TqaiError unless ``trained=True`` states that
    the model was trained with it. For softmax models, ``block_attention(.., far="linear")`` uses a linear form for far keys.
    """
    if not trained:
        raise TqaiError(
            "spherical attention asked for a model that is not known to be trained with it: its outputs would be far from softmax; give "
            "trained=True if it was, or block_attention(.., far='linear') for a softmax model"
        )
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise TqaiError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: all must be [.., tokens, d] with the dimensions before alike"
        )
    wide, k32 = q.float(), k.float()
    norm = (wide @ (k32.mT @ k32) * wide).sum(-1, keepdim=True).clamp_min(EPS).sqrt()
    return (wide @ (k32.mT @ v.float()) / norm).to(torch.result_type(q, v))
