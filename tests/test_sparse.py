"""Block-sparse attention against a slow reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai_core.attention import block_attention
from tqai_core.attention.sparse import local_index


def reference(q, k, v, index, bq, bk):
    b, h, n, _ = q.shape
    m = k.shape[2]
    live = torch.zeros(b, h, n, m, dtype=torch.bool)
    index = index.expand(b, h, -1, -1)
    for i in range(n):
        for j in range(m):
            live[:, :, i, j] = (index[:, :, i // bq] == j // bk).any(-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=live)


@given(
    n=st.integers(1, 40), m=st.integers(1, 40), bq=st.integers(1, 12), bk=st.integers(1, 12), kept=st.integers(1, 5),
    wide=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_against_a_mask(n, m, bq, bk, kept, wide, seed):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, 3, size, 8, generator=g) for size in (n, m, m))
    blocks = -(-m // bk)
    kept = min(kept, blocks)
    shape = (2, 3) if wide else (1, 1)
    index = torch.rand(*shape, -(-n // bq), blocks, generator=g).argsort(-1)[..., :kept]
    assert torch.allclose(block_attention(q, k, v, index, bq, bk), reference(q, k, v, index, bq, bk), atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_a_full_index_is_dense_attention(dtype, tolerance):
    q, k, v = torch.randn(3, 1, 2, 50, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = torch.arange(7).expand(1, 1, 7, 7)
    assert torch.allclose(block_attention(q, k, v, index, 8, 8).float(), F.scaled_dot_product_attention(q, k, v).float(), atol=tolerance)


def test_wrong_shapes_and_blocks_out_of_range():
    q = torch.randn(1, 2, 16, 8)
    good = torch.zeros(1, 1, 2, 1, dtype=torch.long)
    for index, word in ((good[0], "expected"), (good[:, :, :1], "expected"), (good + 2, "0 to 1"), (good - 1, "0 to 1")):
        with pytest.raises(ValueError, match=word):
            block_attention(q, q, q, index, 8, 8)
    with pytest.raises(ValueError, match="alike"):
        block_attention(q, q[:, :1], q, good, 8, 8)


def test_the_local_support_is_near_on_the_grid_and_sees_all_text():
    index = local_index(4 + 64, 4, 5, (8, 8), (4, 0), torch.device("cpu"))[0, 0]
    assert bool((index == 0).any(-1).all()), "the text block"
    assert index.shape == (17, 5)
    mine = torch.arange(17)
    assert bool((index == mine[:, None]).any(-1).all()), "its own block"
    above = (mine[1:-2] + 2).tolist()  # four tokens are half a row: two blocks on is the row below
    assert all(below in row for below, row in zip(above[2:-2], index[3:-4].tolist(), strict=True))
