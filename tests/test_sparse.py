"""Block-sparse attention against a slow reference: every backend, both far fields, masks, ragged lengths, duplicates."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai_core.attention import block_attention, clusters, dense, far_field, sparse, spherical_attention
from tqai_core.attention.backends import Backend, flex
from tqai_core.attention.blocks import Blocks
from tqai_core.attention.far_field import FAR
from tqai_core.attention.token_order import TileOrder, local_index, tile_shape
from tqai_core.metrics import nmse
from tqai_core.registry import build

ROOT = Path(__file__).resolve().parents[1]


def reference(q, k, v, index, bq, bk, far=None, keys=None):
    """One query at a time, float64, straight from the definitions."""
    (b, h, n, d), m = q.shape, k.shape[2]
    out = torch.zeros(b, h, n, v.shape[3], dtype=torch.float64)
    q, k, v = q.double() / d**0.5, k.double(), v.double()
    for i, j, r in itertools.product(range(b), range(h), range(n)):
        row = index[min(i, len(index) - 1), min(j, index.shape[1] - 1), r // bq]
        near = set(row.nonzero().flatten().tolist()) if index.dtype == torch.bool else set(row.tolist())
        seen = torch.ones(m, dtype=torch.bool) if keys is None else keys[min(i, len(keys) - 1)]
        near = torch.tensor([t // bk in near for t in range(m)]) & seen
        rest = seen & ~near
        query, own, values = q[i, j, r], k[i, j], v[i, j]
        logits, chosen = [own[near] @ query], [values[near]]
        if far == "linear" and rest.any():
            centre, z = own[rest].mean(0) @ query, (own[rest] - own[rest].mean(0)) @ query
            weight = (1 + z)[:, None] / len(z)  # 1 + z, its mass to the second order
            logits.append((centre + math.log(len(z)) + math.log1p(z.square().mean() / 2))[None])
            chosen.append((weight * values[rest]).sum(0)[None])
        if far in ("centroid", "clusters") and rest.any():
            block = torch.arange(m) // bk
            parts = {at: own[seen & (block == at)].mean(0) for at in block[seen].tolist()}
            within = own[seen] - torch.stack([parts[at] for at in block[seen].tolist()])  # of all blocks alike
            change = ((within @ query)[:, None] * values[seen]).mean(0)
            few, fine = [], {}
            if far == "clusters":
                centre = q[i, j, r // bq * bq :][:bq].mean(0)
                mass = {at: float(parts[at] @ centre) + math.log(int((seen & (block == at)).sum())) for at in block[rest].tolist()}
                few = sorted(mass, key=lambda at, mass=mass: -mass[at])[: math.ceil(math.ceil(m / bk) / 6)]
                fine = {at: clustered(own[seen & (block == at)], -(-bk // 4)) for at in parts}
                inside = torch.cat([own[seen & (block == at)][c] - own[seen & (block == at)][c].mean(0) for at in parts for c in fine[at]])
            usual = q[i, j].square().mean(0)
            wider = lambda x, usual=usual: math.log1p(float((usual * x.square().mean(0)).sum()) / 2)
            for at in set(block[rest].tolist()):
                mine = rest & (block == at)
                for c in fine[at] if at in few else [torch.arange(int(mine.sum()))]:
                    spread, more = (wider(inside), 0.0) if at in few else (wider(within), change)
                    logits.append((own[mine][c].mean(0) @ query + math.log(len(c)) + spread)[None])
                    chosen.append((values[mine][c].mean(0) + more)[None])
        logits = torch.cat(logits)
        if len(logits):
            out[i, j, r] = logits.softmax(0) @ torch.cat(chosen)
    return out


def clustered(x, count):
    """The keys ``x`` as lists, each nearest to one of ``count`` seeds that are as far from each other as they come."""
    seed = [int((x - x.mean(0)).norm(dim=1).argmax())]
    for _ in range(min(count, len(x)) - 1):
        seed.append(int(torch.cdist(x, x[seed]).amin(1).argmax()))
    nearest = torch.cdist(x, x[seed]).argmin(1)
    return [found for i in range(len(seed)) if len(found := (nearest == i).nonzero().flatten())]


def case(seed, n, m, bq, bk, kept, marks, hide, sizes=(8, 16, 5), b=2, h=2):
    """Keys with a mean of their own, an index with duplicates or marks (rows without any too), padded keys (all of them in a row)."""
    g = torch.Generator().manual_seed(seed)
    d, dv = sizes[seed % 2], sizes[seed % 3]
    q, k, v = (torch.randn(b, h, size, width, generator=g) for size, width in ((n, d), (m, d), (m, dv)))
    nq, nk = -(-n // bq), -(-m // bk)
    shape = ((b, h), (1, h), (b, 1), (1, 1))[seed % 4]
    index = torch.rand(*shape, nq, nk, generator=g) < 0.4 if marks else torch.randint(0, nk, (*shape, nq, kept), generator=g)
    keys = None if hide is None else torch.rand((1, b)[seed % 2], m, generator=g) >= hide
    return q, k + 2, v - 1, index, keys


CASES = {
    "seed": st.integers(0, 999), "n": st.integers(1, 40), "m": st.integers(1, 40), "bq": st.integers(1, 12), "bk": st.integers(1, 12),
    "kept": st.integers(1, 5), "marks": st.booleans(), "hide": st.sampled_from([None, 0.1, 0.6, 1.0]),
}  # fmt: skip


@pytest.mark.parametrize("far", [None, *FAR])
@given(**CASES)
@settings(max_examples=40, deadline=None)
def test_against_the_reference(far, seed, n, m, bq, bk, kept, marks, hide):
    q, k, v, index, keys = case(seed, n, m, bq, bk, kept, marks, hide)
    want = reference(q, k, v, index, bq, bk, far, keys)
    assert torch.allclose(block_attention(q, k, v, index, bq, bk, far, keys=keys).double(), want, atol=1e-5)
    half = block_attention(*(x.bfloat16() for x in (q, k, v)), index, bq, bk, far, keys=keys)
    assert half.dtype == torch.bfloat16
    if far != "clusters":  # of two blocks or keys that are nearly alike, rounding may prefer the other: judged below
        assert (half.double() - want).abs().max() < 0.1


@given(**CASES)
@settings(max_examples=25, deadline=None)
def test_flex_with_its_block_mask(seed, n, m, bq, bk, kept, marks, hide):
    """The eager one, which ignores a mask without a mask_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v, index, keys = case(seed, n, m, bq, bk, kept, marks, hide, sizes=(8, 8, 8))
    blocks = Blocks.of(q, k, index, bq, bk, keys)
    assert torch.allclose(
        flex.attend(q, k, v, blocks, run=flex_attention).double(), reference(q, k, v, index, bq, bk, None, keys), atol=1e-5
    )


def test_flex_that_does_not_compile_warns_once_and_is_replaced(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("no compiler here")

    q = torch.randn(1, 1, 64, 16)
    index = torch.zeros(1, 1, 4, 1, dtype=torch.long)
    want = block_attention(q, q, q, index, 16, 16)
    monkeypatch.setattr(flex, "_why", "")
    monkeypatch.setitem(sparse.BACKENDS, "flex", Backend("flex", lambda *call, asked=False: flex._why, flex.attend))
    monkeypatch.setattr(flex, "_compiled", lambda: fails)
    with pytest.warns(UserWarning, match="no compiler here"):
        assert torch.equal(block_attention(q, q, q, index, 16, 16), want)
    assert torch.equal(block_attention(q, q, q, index, 16, 16), want)


def test_backends_say_why_they_do_not_run(monkeypatch):
    monkeypatch.delenv("TQAI_TRITON", raising=False)
    q, index = torch.randn(1, 1, 16, 8), torch.zeros(1, 1, 2, 1, dtype=torch.long)
    blocks = Blocks.of(q, q, index, 8, 8, None)
    near, far = ({name: b.takes(q, q, q, blocks, form) for name, b in sparse.BACKENDS.items()} for form in (None, "linear"))
    assert list(near) == ["triton", "flex", "torch"]
    assert "TQAI_TRITON=1" in near["triton"]
    assert "CUDA" in near["flex"]
    assert "no far field" in far["flex"]
    assert near["torch"] == far["torch"] == ""


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("far", [None, *FAR])
def test_a_full_index_is_dense_attention(dtype, tolerance, far):
    q, k, v = torch.randn(3, 1, 2, 50, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    index = torch.arange(7).expand(1, 1, 7, 7)
    dense = F.scaled_dot_product_attention(q, k, v).float()
    assert torch.allclose(block_attention(q, k, v, index, 8, 8, far).float(), dense, atol=tolerance)
    twice = torch.cat([index, index.flip(-1)], -1)
    assert torch.allclose(block_attention(q, k, v, twice, 8, 8, far).float(), dense, atol=tolerance), "named twice, counted once"


@pytest.mark.parametrize("group, chunk", [(1, 1), (1 << 12, 1 << 14), (1 << 30, 1 << 30)])
@pytest.mark.parametrize("far", [None, *FAR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_however_heads_and_blocks_are_cut(group, chunk, far, dtype, monkeypatch):
    g = torch.Generator().manual_seed(3)
    q, k, v = torch.randn(3, 2, 90, 3, 16, generator=g).to(dtype).transpose(2, 3).unbind()  # [b, n, h, d] seen as [b, h, n, d]
    index = torch.randint(0, 12, (2, 3, 6, 4), generator=g)
    want = block_attention(q, k, v, index, 16, 8, far)
    for module in (sparse, far_field):
        monkeypatch.setattr(module, "GROUP", group)
    monkeypatch.setattr(sparse, "CHUNK", chunk)
    assert torch.allclose(block_attention(q, k, v, index, 16, 8, far), want, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_far_fields_err_less_than_none_on_smooth_keys():
    """What they are for: weak, many, ignored otherwise."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 512, 32, generator=g)
    v = v + torch.linspace(-1, 1, 512)[:, None]
    index = torch.arange(8)[None, None, :, None]
    full = F.scaled_dot_product_attention(q, k, v)
    errors = {far: float((block_attention(q, k, v, index, 64, 64, far) - full).square().mean()) for far in (None, "linear", "centroid")}
    assert errors["linear"] < errors["centroid"] < 0.3 * errors[None]


@pytest.fixture(scope="module")
def attentions():
    """Queries, keys and values of the WAN mini's two sampling steps, 576 tokens, and those two blocks of 64 keys a row that count most."""
    from bench.attention import Capture
    from bench.harness import Mini
    from bench.sol import most

    from tqai_core.hosts.diffusers import minis

    inputs = {**minis.inputs("wan", [3]), "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    with Capture() as seen:
        Mini("wan").pipe(**inputs, num_inference_steps=2)
    return [(q, k, v, most(build("scorer", "bsa").mass(q, k, 64, 64), 18)) for q, k, v in seen.found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clusters_have_less_than_half_the_error_of_centroids_on_a_trained_model(dtype, attentions):
    def error(far):
        runs = [(block_attention(*(x.to(dtype) for x in (q, k, v)), index, 64, 64, far), q, k, v) for q, k, v, index in attentions]
        return sum(nmse(out.float(), F.scaled_dot_product_attention(q, k, v)) for out, q, k, v in runs) / len(runs)

    found = {far: error(far) for far in (None, *FAR)}
    assert found["clusters"] < 0.5 * min(found["centroid"], found["linear"]) < 0.5 * found[None], found
    assert 1e-3 < found["clusters"] < 1e-2


def test_keys_that_are_hidden_or_equal_are_no_seeds():
    own = torch.tensor([[[0.0], [5.0], [0.0], [-4.0]], [[1.0], [1.0], [1.0], [1.0]]])
    live = torch.tensor([[True, True, False, True], [True, True, True, True]])
    found = clusters.seeds(own, live, 3)
    assert found[0][[1, 3, 0]].tolist() == [0, 1, 2], "the farthest from the mean, from that one, from both"
    assert found[1].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("far", FAR)
def test_sums_over_many_keys_fit_half_precision(far):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 6000, 16, generator=g)
    q, k, v = q / 4, k * 12 + 6, v * 12 + 6
    index = torch.arange(24)[None, None, :, None]
    want, half = (block_attention(q.to(t), k.to(t), v.to(t), index, 256, 256, far).float() for t in (torch.float32, torch.float16))
    if far == "clusters":  # other keys are seeds: no nearer to the other result, but as near to the exact one
        exact = F.scaled_dot_product_attention(q, k, v)
        assert nmse(half, exact) == pytest.approx(nmse(want, exact), rel=0.01)
    else:
        assert float((half - want).norm() / want.norm()) < 0.01


def test_logits_of_any_size():
    q, k, v = torch.randn(3, 1, 1, 64, 8, generator=torch.Generator().manual_seed(0))
    for far in (None, *FAR):
        out = block_attention(q * 100, k * 100, v, torch.zeros(1, 1, 4, 1, dtype=torch.long), 16, 16, far)
        assert bool(torch.isfinite(out).all())
        assert out.abs().max() < 50


def test_empty_ones():
    q = torch.randn(1, 2, 16, 8)
    nothing = block_attention(q, q, q, torch.zeros(1, 1, 2, 0, dtype=torch.long), 8, 8)
    assert torch.equal(nothing, torch.zeros_like(q))
    assert block_attention(q[:, :, :0], q, q, torch.zeros(1, 1, 0, 1, dtype=torch.long), 8, 8).shape == (1, 2, 0, 8)
    unseen = block_attention(q, q, q, torch.zeros(1, 1, 2, 2, dtype=torch.bool), 8, 8)
    assert torch.equal(unseen, torch.zeros_like(q))
    marked = block_attention(q, q, q, torch.zeros(1, 1, 2, 2, dtype=torch.bool), 8, 8, "centroid")
    assert bool((marked != 0).any()), "all keys are far away"


def test_wrong_shapes_and_blocks_out_of_range():
    q = torch.randn(1, 2, 16, 8)
    good = torch.zeros(1, 1, 2, 1, dtype=torch.long)
    for index, word in ((good[0], "expected"), (good[:, :, :1], "expected"), (good + 2, "0 to 1"), (good - 1, "0 to 1")):
        with pytest.raises(ValueError, match=word):
            block_attention(q, q, q, index, 8, 8)
    with pytest.raises(ValueError, match="alike"):
        block_attention(q, q[:, :1], q, good, 8, 8)
    with pytest.raises(ValueError, match="floating type"):
        block_attention(q, q.bfloat16(), q, good, 8, 8)
    with pytest.raises(ValueError, match="integers"):
        block_attention(q, q, q, good.float(), 8, 8)
    with pytest.raises(ValueError, match="expected"):
        block_attention(q, q, q, good.bool(), 8, 8)
    with pytest.raises(ValueError, match="block_k"):
        block_attention(q, q, q, good, 8, 0)
    with pytest.raises(ValueError, match="'centroid' or 'linear' or 'clusters'"):
        block_attention(q, q, q, good, 8, 8, far="taylor")
    with pytest.raises(ValueError, match="True for keys"):
        block_attention(q, q, q, good, 8, 8, keys=torch.ones(1, 15, dtype=torch.bool))
    with pytest.raises(ValueError, match="no far field"):
        block_attention(q, q, q, good, 8, 8, far="linear", backend="flex")
    with pytest.raises(ValueError, match="'torch'"):
        block_attention(q, q, q, good, 8, 8, backend="cuda")


def test_the_extra_memory_is_bounded():
    """By the peak of the process, as the bench does, at 8192 tokens in bf16."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("no /proc/self/clear_refs")
    code = (
        "from bench.attention import FAR, extra_memory\n"
        "print(max(extra_memory(8192, 128, 'bf16', d, far) for d in (.5,) for far in (None, *FAR)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True)
    assert 0 <= float(run.stdout) < 16 * 2**20


def test_the_bench_measures_what_it_prints(monkeypatch):
    from bench import attention

    monkeypatch.setattr(attention, "SIZES", {"bf16": (32, {512: 1}), "fp32": (32, {512: 1})})
    rows = [row for kind, (d, sizes) in attention.SIZES.items() for n, h in sizes.items() for row in attention.speed(kind, n, h, d)]
    best = {
        kind: min(r["seconds"] for r in rows if r["dtype"] == kind and r["method"] in ("sdpa", "products")) for kind in ("bf16", "fp32")
    }
    for row in rows:
        assert row["over_best"] == pytest.approx(best[row["dtype"]] / row["seconds"])
    head, table = attention.speeds({"speed": rows})
    assert [len(row) for row in table] == [len(head)] * 2
    assert attention.plot({"speed": rows}).count("<polyline") == 8
    lines = attention.verdicts({
        "speed": [{**row, "n": 8192} for row in rows], "memory": [{"extra": 17 * 2**20}],
        "wan": [{"method": name, "nmse": [1.0, 2.0 if "order 1" in name else 0.5]} for name in attention.E2E],
    })  # fmt: skip
    assert [line["ok"] for line in lines][-6:] == [False] * 6, "the worst seed counts"


# -- Triton


def test_triton_in_its_interpreter():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "TQAI_TRITON": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("equal") == 24


def _interpret() -> None:
    from tqai_core.attention.backends import triton_sparse

    assert triton_sparse.wanted(torch.zeros(1))
    for seed in range(12):
        g = torch.Generator().manual_seed(100 + seed)
        n, m, bq, bk, kept = (int(torch.randint(1, high, (1,), generator=g)) for high in (70, 50, 20, 20, 5))
        q, k, v, index, keys = case(seed, n, m, bq, bk, kept, seed % 2 == 1, (None, 0.1, 1.0)[seed % 3])
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-2)):
            for far in (None, *FAR):
                qkv = [x.to(dtype) for x in (q, k, v)]
                out = block_attention(*qkv, index, bq, bk, far, keys=keys)  # TQAI_TRITON chooses it
                if far == "clusters" and dtype == torch.float16:  # rounding chooses other seeds
                    want = block_attention(*qkv, index, bq, bk, far, keys=keys, backend="torch").double()
                else:
                    want = reference(q, k, v, index, bq, bk, far, keys)
                gap = (out.double() - want).abs().max()
                assert gap < tolerance, (seed, dtype, far, float(gap))
            print("equal")


def test_triton_that_is_missing_is_an_error_that_says_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    q = torch.randn(1, 1, 16, 8)
    with pytest.raises(ValueError, match="pip install triton"):
        block_attention(q, q, q, torch.zeros(1, 1, 2, 1, dtype=torch.long), 8, 8, backend="triton")


# -- dense


def test_dense_products_are_the_attention():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, d, generator=g) for n, d in ((70, 16), (50, 16), (50, 8)))
    assert torch.allclose(dense.products(q, k, v, 0.3), F.scaled_dot_product_attention(q, k, v, scale=0.3), atol=1e-5)


def test_dense_is_measured_once_and_switched_off(monkeypatch):
    q = torch.randn(1, 2, 200, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    measured = []
    monkeypatch.setattr(dense, "_CHOSEN", {})
    monkeypatch.setattr(dense, "_measure", lambda *a: measured.append(a) or "products")
    state = torch.get_rng_state()
    fast = dense.attention(q, q, q)
    dense.attention(q, q, q)
    assert len(measured) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fast, dense.products(q, q, q))
    exact = F.scaled_dot_product_attention(q, q, q)
    assert (fast - exact).float().norm() < 2**-7 * exact.float().norm(), "within the rounding of bf16"
    monkeypatch.setenv("TQAI_DENSE", "sdpa")
    assert torch.equal(dense.attention(q, q, q), exact)
    monkeypatch.delenv("TQAI_DENSE")
    assert torch.equal(dense.attention(*(3 * [q.float()])), F.scaled_dot_product_attention(*(3 * [q.float()]))), "fp32 is never measured"
    assert len(measured) == 1
    monkeypatch.undo()
    assert dense.choice(q, q, q) in ("sdpa", "products")


def test_blocks_in_bf16_go_the_faster_way(monkeypatch):
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 500, 64, generator=g).bfloat16()
    index = torch.randint(0, 8, (1, 2, 4, 3), generator=g)
    exact, timed, state = block_attention(q.float(), k.float(), v.float(), index, 128, 64), [], torch.get_rng_state()
    monkeypatch.setattr(sparse, "_FUSED", {})
    monkeypatch.setattr(sparse, "faster", lambda usual, other: timed.append((usual(), other())) or other.func.__name__ == "fused")
    fused = block_attention(q, k, v, index, 128, 64)
    assert torch.equal(block_attention(q, k, v, index, 128, 64), fused)
    assert len(timed) == 1, "once a size"
    block_attention(q, k, v, index, 128, 64, "centroid")
    assert len(timed) == 1, "a far field is no matter of the fused attention"
    monkeypatch.setenv("TQAI_SPARSE", "products")
    products = block_attention(q, k, v, index, 128, 64)
    monkeypatch.setenv("TQAI_SPARSE", "fused")
    assert torch.equal(block_attention(q, k, v, index, 128, 64), fused)
    assert not torch.equal(products, fused)
    assert max(nmse(products.float(), exact), nmse(fused.float(), exact)) < 3e-5
    assert len(timed) == 1
    assert torch.equal(torch.get_rng_state(), state)
    monkeypatch.undo()
    assert nmse(block_attention(q, k, v, index, 128, 64).float(), exact) < 3e-5, "timed here"


# -- spherical


def test_spherical_is_exact_in_linear_time_and_refuses_softmax_models():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, d, generator=g) for n, d in ((7, 8), (9, 8), (9, 5)))
    z = (q @ k.mT / 8**0.5).double()
    want = (z / z.square().sum(-1, keepdim=True).sqrt()) @ v.double()
    assert torch.allclose(spherical_attention(q, k, v, trained=True).double(), want, atol=1e-5)
    with pytest.raises(ValueError, match=r"far from softmax.*trained=True"):
        spherical_attention(q, k, v)
    with pytest.raises(ValueError, match="alike"):
        spherical_attention(q, k[:1], v, trained=True)


# -- tile order


@given(grid=st.lists(st.integers(1, 9), min_size=1, max_size=3), block=st.integers(1, 70), text=st.integers(0, 5), first=st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_tile_order_is_a_permutation_that_leaves_text_alone(grid, block, text, first):
    n = math.prod(grid) + text
    order = TileOrder.of(n, block, tuple(grid), first)
    assert len(order) == n
    assert math.prod(order.tile) <= block
    x = torch.arange(n)
    tiled = order.apply(x, 0)
    assert torch.equal(order.undo(tiled, 0), x)
    assert torch.equal(order.apply(order.undo(x, 0), 0), x)
    own = slice(0, text) if first else slice(n - text, n)
    assert torch.equal(tiled[own], x[own])
    assert order.raster == torch.equal(tiled, x)


def test_tiles_are_cubes_and_runs_of_them_are_whole_tiles():
    assert tile_shape((9, 8, 8), 16) == (1, 4, 4)
    assert tile_shape((9, 8, 8), 12) == (3, 2, 2)
    assert tile_shape((16, 16, 32), 64) == (4, 4, 4)
    order = TileOrder.of(16 * 16 * 32, 64, (16, 16, 32))
    place = order.places().view(-1, 64, 3)
    assert bool(((place.amax(1) - place.amin(1)) == 3).all())


def test_rotary_tables_follow_the_tokens():
    """Rotated in tile order as in raster order: attention does not depend on the order."""
    order = TileOrder.of(5 + 48, 8, (3, 4, 4), text_first=True)
    g = torch.Generator().manual_seed(0)
    x, table = torch.randn(53, 16, generator=g), torch.randn(53, 16, generator=g)
    assert torch.equal(order.apply(x * table, 0), order.apply(x, 0) * order.apply_rope(table))
    inside = TileOrder(order.grid, order.tile)
    assert torch.equal(order.apply_rope(table[5:]), inside.apply(table[5:], 0))
    with pytest.raises(ValueError, match="53 tokens, or the 48"):
        order.apply_rope(table[:50])


def test_the_local_support_is_near_on_the_grid_and_sees_all_text():
    order = TileOrder.of(4 + 64, 1, (8, 8), True)  # tiles of one token: the raster
    index = local_index(order, 4, 4, 5, torch.device("cpu"))[0, 0]
    assert bool((index == 0).any(-1).all()), "the text block"
    assert index.shape == (17, 5)
    mine = torch.arange(17)
    assert bool((index == mine[:, None]).any(-1).all()), "its own block"
    above = (mine[1:-2] + 2).tolist()  # four tokens are half a row: two blocks on is the row below
    assert all(below in row for below, row in zip(above[2:-2], index[3:-4].tolist(), strict=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _interpret()
