"""Caches of diffusion transformers held as the inputs of attention, packed rows read in place, and the edit mini that measures both."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parent))
from bench import dit_kv, dit_kv_cost
from minis import edit
from test_dit_kv import bed, error, names_in, pair, same

import tqai_core as tqai
from tqai_core.attention import prefix as prefix_attention
from tqai_core.attention.lazy_prefix import PrefixKV, lazy
from tqai_core.attention.prefix import attend
from tqai_core.codecs.rows import Rows
from tqai_core.hosts.diffusers.projections import Rotary
from tqai_core.kv.inputs import Inputs, bits_for
from tqai_core.kv.prefix import Prefix, energy
from tqai_core.kv.segments import Plan
from tqai_core.metrics import nmse, psnr
from tqai_core.types import nbytes

BOTH = pytest.mark.parametrize("name", ["qwenimage21", "flux2_klein_kv"])
MEASURED = {"qwenimage21": (2.7e-8, 5.4e-7, 5.1e-6), "flux2_klein_kv": (1.16e-9, 1.92e-8, 4.25e-7)}  # NMSE of outputs at 4, 3, 2 bits


def config(bits: int = 4, **options: Any) -> tqai.Config:
    return tqai.Config(level="kv", codec=f"turbo:bits={bits}", **{"recent": 0, **options})


# -- inputs in pipelines


@BOTH
def test_inputs_have_less_error_than_rows_of_the_same_bits(name):
    found = [error(bed(name).packed(config(bits)), bed(name)) for bits in (4, 3, 2)]
    print(name, found)
    assert all(0 < value <= 1.5 * bound for value, bound in zip(found, MEASURED[name], strict=True))
    rows = error(bed(name).packed(tqai.Config(level="kv", codec="turbo:bits_k=4,bits_v=4", recent=0)), bed(name))
    assert found[0] < rows / 100, "20 dB"


@BOTH
def test_inputs_are_walked_and_reported(name):
    run = bed(name).packed(config())
    assert run.left == 0
    rows = run.report.per_site
    assert all(row["tokens"] == row["tokens_packed"] > 0 and row["nmse_k"] < 5e-5 and row["nmse_v"] < 5e-5 for row in rows.values())
    later = [row["bits_held"] for site, row in rows.items() if not site.startswith("attn.0")]
    assert max(later) < 4.2, "the first layer counts the rotary positions of all"
    assert not run.report.fallbacks


@BOTH
def test_the_default_holds_inputs(name):
    """Its 5 and 4 bits are those of rows, which it holds where keys and values are no projections."""
    run = bed(name).packed(tqai.Config(level="kv", recent=0))
    assert {row["bits_inputs"] for row in run.report.per_site.values()} == {8}
    assert same(run.outputs, bed(name).packed(config()).outputs)


@BOTH
def test_inputs_a_second_run_and_removed(name):
    b = bed(name)
    with tqai.apply(b.pipe, config()) as handle:
        assert same(b.call(), b.packed(config()).outputs)
        assert handle.nbytes == 0
    assert same(b.packed(config(offload=True)).outputs, b.packed(config()).outputs)
    assert names_in(b.pipe.transformer) == b.names
    assert same(b.call(), b.exact)


def test_keys_that_are_no_projection_are_held_as_rows_and_the_report_says_so():
    b = bed("flux2_klein_kv")
    attention = b.pipe.transformer.transformer_blocks[0].attn
    plain = attention.processor

    class Louder(type(plain)):
        def __call__(
            self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None,
            image_rotary_emb: Any = None, kv_cache: Any = None, kv_cache_mode: Any = None, num_ref_tokens: int = 0,
        ) -> Any:  # fmt: skip
            if kv_cache_mode == "extract":
                store = kv_cache.store
                kv_cache.store = lambda k, v: store(k * 2, v)
            text = encoder_hidden_states, attention_mask, image_rotary_emb
            try:
                return super().__call__(attn, hidden_states, *text, kv_cache, kv_cache_mode, num_ref_tokens)
            finally:
                vars(kv_cache).pop("store", None)

    attention.set_processor(Louder())
    try:
        run = b.packed(config(protect=1))
    finally:
        attention.set_processor(plain)
    assert [f["where"] for f in run.report.fallbacks] == ["attn.0"]
    assert "rows are held" in run.report.fallbacks[0]["why"]
    assert run.report.per_site["attn.0"]["nmse_k"] > 5e-3 > 5e-5 > run.report.per_site["attn.1"]["nmse_k"]


@pytest.fixture(params=["fp32", "bf16"])
def products(request, monkeypatch):
    """Of queries with packed rows: on a CPU that multiplies bfloat16, and on one that does not."""
    monkeypatch.setattr(prefix_attention, "multiplies_bfloat16", lambda: request.param == "bf16")
    return request.param


@BOTH
def test_packed_rows_are_never_made_dense(name, products):
    """The same as from decoded layers, but for rounding."""
    for codec in ("turbo:bits_k=8,bits_v=4", "turbo"):
        c = tqai.Config(level="kv", codec=codec, recent=0)
        with tqai.apply(bed(name).pipe, c) as handle:
            outputs, report = bed(name).call(), handle.report()
        assert all(row["materialised"] == 0 for row in report.per_site.values())
        with tqai.apply(bed(name).pipe, c) as handle:
            undo = bed(name).pipe.transformer.register_forward_pre_hook(lambda *_: decode(handle), with_kwargs=False)
            decoded = bed(name).call()
            undo.remove()
            rows = handle.report().per_site.values()
        assert all(row["materialised"] > 0 for row in rows)
        rounding = max(nmse(x, y) for x, y in zip(outputs, decoded, strict=True))
        packing = max(nmse(x, y) for x, y in zip(outputs, bed(name).exact, strict=True))
        assert rounding < (packing / 30 if products == "bf16" and codec != "turbo" else 1e-11)


def decode(handle: Any) -> None:
    for layer in list(handle._layers):
        layer.slots.in_place = lambda: False


# -- parts


@pytest.mark.parametrize(
    ("width", "numbers", "bits", "found"), [(128, 256, 4, 8), (128, 256, 3, 6), (128, 256, 2, 4), (96, 192, 4, 0), (256, 128, 4, 0)]
)
def test_bits_of_inputs(width, numbers, bits, found):
    """None where keys and values are few beside the inputs, or where blocks of 64 do not fit."""
    assert bits_for(width, numbers, bits) == found


def test_inputs_are_packed_only_where_they_give_the_keys_and_values():
    x, weight = torch.randn(1, 300, 128, generator=torch.Generator().manual_seed(0)), torch.randn(256, 128) / 11
    project = lambda x, first: tuple(part.unflatten(2, (2, 64)) for part in (x @ weight.T).chunk(2, 2))
    k, v = project(x, 0)
    found = Inputs.pack(k, v, x, 8, project, [])
    assert found is not None
    assert all(nmse(own, exact) < 5e-5 for own, exact in zip(found.dense(), (k, v), strict=True))
    assert found.nbytes <= nbytes([k, v]) / 4 * 4.3 / 8 + 512
    assert torch.equal(found.part(128, 64)[0], found.dense()[0][:, 128:192])
    assert Inputs.pack(k, v * 1.1, x, 8, project, []) is None
    assert Inputs.pack(k, v, x[:, :200], 8, project, []) is None
    assert Inputs.pack(k[:, :, :1], v, x, 8, project, []) is None
    assert Inputs.pack(k, v, x.index_fill(1, torch.tensor(7), torch.nan), 8, project, []) is None


def test_rotary_positions_are_the_same_numbers_in_less():
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

    ids = torch.cat([edit.grid(0), edit.grid(10), edit.grid(20)])
    angles = Flux2PosEmbed(theta=2000, axes_dim=[16] * 4)(ids)
    found, k = Rotary.of(angles, 64, 128, [8] * 4), torch.randn(2, 100, 3, 64, generator=torch.Generator().manual_seed(0))
    exact = apply_rotary_emb(k, tuple(x[74:174] for x in angles), sequence_dim=1)
    assert nmse(found.turn(k, 10), exact) < 1e-13
    assert nbytes(found.tensors) < nbytes([x[64:] for x in angles]) / 25


@pytest.mark.parametrize("d", [64, 128])
def test_eight_bits_reach_as_far_as_a_row_does(d):
    """A fixed reach of 4.5 standard deviations has an NMSE of 1.04e-4."""
    coder = Rows(d, 8, 0, torch.device("cpu"))
    x = torch.randn(4096, d, generator=torch.Generator().manual_seed(0))
    assert nmse(coder.decode(*coder.encode(x)), x) < {64: 4e-5, 128: 4.6e-5}[d]
    x[:, 0] *= 100
    assert nmse(coder.decode(*coder.encode(x)), x) < 4.6e-5


# -- in place


def joined(prefix: Prefix, own: list[Tensor], counts: list[int]) -> tuple[list[PrefixKV], list[Tensor]]:
    given = lazy([prefix], lambda: counts.append(1))
    cat = lambda x, held: torch.cat([x[:, :5], held, x[:, 5:]], dim=1)
    return [cat(x, held) for x, held in zip(own, given, strict=True)], [cat(x, held) for x, held in zip(own, prefix.dense(), strict=True)]


@pytest.mark.parametrize(
    ("bits_k", "bits_v", "dim", "dtype", "most"),
    [
        (4, 4, 64, torch.float32, 1e-11),
        (8, 3, 128, torch.float32, 1e-11),
        (6, 2, 64, torch.bfloat16, 1e-4),
        (5, 8, 64, torch.float32, 1e-11),
    ],
)
def test_attention_in_place_is_that_to_the_decoded_rows(bits_k, bits_v, dim, dtype, most, products):
    """Two sequences, several blocks of queries and of tokens, exact tokens on both sides, values on axes of their own."""
    g = torch.Generator().manual_seed(0)
    k, v, q, own_k, own_v = (torch.randn(2, n, 2, dim, generator=g).to(dtype) for n in (2300, 2300, 1100, 70, 70))
    k, v = k * torch.logspace(0, 1, dim).to(dtype) + 1, v * torch.logspace(0, -3, dim).to(dtype)
    prefix = Prefix.pack(k, v, Plan(bits_k, bits_v, sink=3, recent=9, calibrate=1), energy(q, 2))
    counts: list[int] = []
    ours, dense = joined(prefix, [own_k, own_v], counts)
    swapped = lambda *x: [one.permute(0, 2, 1, 3) for one in x]
    found = F.scaled_dot_product_attention(*swapped(q, *ours), scale=0.05)
    want = F.scaled_dot_product_attention(*(x.float() for x in swapped(q, *dense)), scale=0.05)
    exact = [torch.cat([own[:, :5], x, own[:, 5:]], 1).float() for own, x in ((own_k, k), (own_v, v))]
    if products == "bf16":  # far below the error of the rows
        most = max(most, nmse(want, F.scaled_dot_product_attention(*swapped(q.float(), *exact), scale=0.05)) / 30)
    assert found.dtype == dtype
    assert nmse(found.float(), want) < most
    assert not counts, "never decoded"
    whole = [torch.cat(two, 1).float() for two in zip(prefix.dense(), (own_k, own_v), strict=True)]
    found = attend(swapped(q)[0], [prefix, own_k], [prefix, own_v], scale=0.05)
    assert nmse(found.float(), F.scaled_dot_product_attention(*swapped(q.float(), *whole), scale=0.05)) < most


def test_anything_else_gets_dense_values():
    k, v = pair(600)
    prefix, counts = Prefix.pack(k, v, Plan(recent=0)), []
    ours, dense = joined(prefix, [x[:, :20] for x in pair(20, 5)], counts)
    assert ours[0].shape == dense[0].shape
    assert torch.equal(ours[0] + 1, dense[0] + 1)
    assert torch.equal(ours[0].transpose(1, 2), dense[0].transpose(1, 2))
    assert len(counts) == 2
    q, mask = torch.randn(1, 2, 7, 64), torch.ones(7, 620).bool().tril(600)
    exact = F.scaled_dot_product_attention(q, *(x.permute(0, 2, 1, 3) for x in dense), attn_mask=mask)
    before = len(counts)
    assert torch.equal(F.scaled_dot_product_attention(q, *(x.permute(0, 2, 1, 3) for x in ours), attn_mask=mask), exact)
    assert len(counts) == before + 1, "keys and values are decoded together"
    q.requires_grad_()
    assert F.scaled_dot_product_attention(q, *(x.permute(0, 2, 1, 3) for x in ours)).requires_grad


def test_memory_of_a_step_beside_what_is_held():
    for row in dit_kv_cost.memory():
        print(row)
        assert row["mib"] <= 2 if row["way"] == "in place" else row["layers"] <= 2


# -- the edit mini


def test_the_edit_mini_draws_what_is_asked_for_and_needs_its_references():
    net = edit.load()
    references, task, wanted = edit.batch(16, edit.VIEWS, True, torch.Generator().manual_seed(2))
    drawn = [edit.sample(net, given, task, 8, seed=1) for given in (references, references.roll(4, 0))]
    drawn.append(edit.sample(net, references, task, 8, 1, dit_kv.forget))
    right = [median(psnr(*x) for x in zip(found, wanted, strict=True)) for found in drawn]
    print(right)
    assert right[0] > 22
    assert right[0] > max(right[1:]) + 8


def test_four_bits_are_like_int8_on_the_edit_mini_with_outliers_too():
    """`tqai bench dit_kv` in small."""
    names = dit_kv.BEST, dit_kv.INT8, dit_kv.ROTATED
    found = {(r["variant"], r["method"]): r for variant in dit_kv.VARIANTS for r in dit_kv.quality(range(6), variant, 8, names)}
    at = lambda variant, method: found[variant, method]["psnr"]
    assert at("plain", dit_kv.BEST) > at("plain", dit_kv.INT8) - 1
    for variant in dit_kv.VARIANTS:
        assert at(variant, dit_kv.BEST) > at(variant, dit_kv.ROTATED) + 6
        assert found[variant, dit_kv.BEST]["bits"] <= 4.3
    assert abs(at("plain", dit_kv.BEST) - at("outliers", dit_kv.BEST)) < 1
