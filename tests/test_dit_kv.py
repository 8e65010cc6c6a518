"""Level kv for diffusion transformers: the caches of diffusers' own pipelines, tiny and random, packed."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parent))
import pipelines
from bench.dit_kv_cost import Live
from pipelines.base import SIZE, WIDTH, WORDS, picture, prompts, rnd, sample, tensors

import tqai_core as tqai
from tqai_core.codecs.rows import Rows
from tqai_core.hosts.diffusers import kv_caches
from tqai_core.hosts.diffusers.layer_caches import Slots, adopt
from tqai_core.kv.prefix import Prefix, energy
from tqai_core.kv.segments import Plan
from tqai_core.metrics import nmse
from tqai_core.types import nbytes

WIDE = dict(num_attention_heads=2, attention_head_dim=64)
STEPS = 4


def config(bits_k: int = 4, bits_v: int = 4, **options: Any) -> tqai.Config:
    return tqai.Config(level="kv", codec=f"turbo:bits_k={bits_k},bits_v={bits_v}", **{"recent": 0, **options})


def heedful(pipe: Any) -> Any:
    """A random model hardly heeds its prefix: values are made larger, so that an error of the cache is one of the output."""
    for name, p in pipe.transformer.named_parameters():
        if name.endswith("to_v.weight"):
            p.mul_(12)
    return pipe


def qwenimage21(tokens: int = 1040) -> tuple[Any, Callable[[], list[Tensor]]]:
    pipe, ones = heedful(pipelines.family("qwenimage21").pipe(**WIDE, axes_dims_rope=(16, 24, 24))), torch.ones(1, tokens).bool()
    text = {f"{side}prompt_embeds": rnd(1, tokens, WIDTH, seed=len(side)) for side in ("", "negative_")}
    masks = {f"{name}_mask": ones for name in text}
    return pipe, lambda **more: sample(pipe, STEPS, 0, **text, **masks, true_cfg_scale=3.0, height=64, width=64, **more)


def flux2_klein_kv() -> tuple[Any, Callable[[], list[Tensor]]]:
    pipe = heedful(pipelines.family("flux2_klein_kv").pipe(**WIDE, axes_dims_rope=(16,) * 4))
    return pipe, lambda **more: sample(pipe, STEPS, 0, prompt_embeds=rnd(1, WORDS, WIDTH), image=picture(512), **SIZE, **more)


def glm_image() -> tuple[Any, Callable[[], list[Tensor]]]:
    """Two pictures, so that the second one is appended."""
    pipe, side = heedful(pipelines.family("glm_image").pipe(**WIDE)), 512 // 16
    ids = torch.randint(0, 64, (16 + 2 * side**2,), generator=torch.Generator().manual_seed(5))
    grids = torch.tensor([[1, side, side]] * 2)
    prior = dict(prior_token_ids=ids[None, :16], prior_token_image_ids=[ids[16:]], source_image_grid_thw=[grids])
    given = dict(**prompts(1, WORDS, WIDTH), **prior, image=[[picture(512), picture(512, 1)]], guidance_scale=3.0, **SIZE)
    return pipe, lambda **more: sample(pipe, STEPS, 0, **given, **more)


def sana_wm_refiner() -> tuple[Any, Callable[[], list[Tensor]]]:
    """Sinks of one frame; a history that grows to three frames and is cut."""
    pipe = heedful(pipelines.family("sana_wm_refiner").pipe(**WIDE, cross_attention_dim=128))
    pipe.set_progress_bar_config(disable=True)
    chunks = dict(block_size=2, kv_max_frames=4, sigmas=(0.9, 0.4, 0.0), output_type="latent", fps=16.0)

    def call(**more: Any) -> list[Tensor]:
        with torch.no_grad():
            return tensors(pipe(rnd(1, 4, 7, 24, 24), "a lake", generator=torch.Generator().manual_seed(0), **chunks, **more))

    return pipe, call


BEDS = {make.__name__: make for make in (qwenimage21, flux2_klein_kv, glm_image, sana_wm_refiner)}
every_bed = pytest.mark.parametrize("name", BEDS)
# NMSE of the output as measured at 8, 4 and 2 bits of keys and values, with room of a half
MEASURED = {
    "qwenimage21": (6.93e-08, 5.68e-06, 1.50e-04), "flux2_klein_kv": (4.62e-09, 1.12e-06, 4.17e-05),
    "glm_image": (1.05e-07, 5.71e-05, 8.70e-03), "sana_wm_refiner": (3.36e-09, 2.25e-06, 6.35e-05),
}  # fmt: skip


@dataclass
class Run:
    outputs: list[Tensor]
    report: Any
    left: int


class Bed:
    def __init__(self, name: str) -> None:
        with torch.no_grad():
            self.pipe, self.call = BEDS[name]()
        self.exact = self.call()
        self.names = names_in(self.pipe.transformer)

    @cache  # noqa: B019  # a bed lives as long as the session
    def packed(self, config: tqai.Config) -> Run:
        with tqai.apply(self.pipe, config) as handle:
            outputs = self.call()
            return Run(outputs, handle.report(), handle.nbytes)


bed = cache(Bed)


def names_in(model: Any) -> list[tuple[Any, ...]]:
    """What a module has for itself, and how many hooks: what a patch that was removed must not change."""
    return [(name, set(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in model.named_modules()]


def error(run: Run, bed: Bed) -> float:
    return max(nmse(a, b) for a, b in zip(run.outputs, bed.exact, strict=True))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# -- pipelines


@every_bed
@pytest.mark.parametrize("off", ["codec exact", "all layers skipped", "too few tokens"])
def test_off_is_bit_exact_and_says_why(name, off):
    settings = {
        "codec exact": tqai.Config(level="kv", codec="exact"), "all layers skipped": config(skip_layers="0-1"),
        "too few tokens": config(calibrate=100_000),
    }  # fmt: skip
    if name == "flux2_klein_kv" and off == "all layers skipped":
        settings[off] = config(skip_layers="0-3")
    run = bed(name).packed(settings[off])
    assert same(run.outputs, bed(name).exact)
    if off == "too few tokens":
        assert {"where": "cache", "why": "fewer than 100000 tokens"} in run.report.fallbacks
    else:
        assert run.report.bytes_held_peak == 0
        assert off.removeprefix("all layers ").startswith(run.report.fallbacks[0]["why"][:4])
    assert run.report.evaluations > STEPS - 2
    assert not run.report.warnings


@every_bed
def test_the_error_falls_with_the_bits_and_is_as_measured(name):
    found = [error(bed(name).packed(config(bits, bits)), bed(name)) for bits in (8, 4, 2)]
    print(name, found)
    for value, bound in zip(found, MEASURED[name], strict=True):
        assert 0 < value <= 1.5 * bound


@every_bed
def test_keys_and_values_have_bits_of_their_own(name):
    mixed = bed(name).packed(config(8, 2)).report
    for row in mixed.per_site.values():
        assert row["nmse_k"] < 2e-4
        assert 0.08 < row["nmse_v"] < 0.16, "2 bits of a Gaussian: .1175"
    swapped = bed(name).packed(config(3, 6)).report
    assert all(row["nmse_v"] < 1.5e-3 < 0.01 < row["nmse_k"] < 0.05 for row in swapped.per_site.values())


@every_bed
def test_bytes_are_walked_and_small(name):
    run = bed(name).packed(config())
    assert run.left == 0, "the caches ended with the pipeline's call"
    assert run.report.bytes_exact >= 3.6 * run.report.bytes_held_peak > 0
    assert all(row["tokens"] - row["tokens_packed"] <= 4 * (2 if name in ("glm_image", "sana_wm_refiner") else 1)
               for row in run.report.per_site.values())  # fmt: skip


@every_bed
def test_a_second_run_is_the_first_and_removed_is_exact(name):
    b = bed(name)
    with tqai.apply(b.pipe, config()) as handle:
        first, second = b.call(), b.call()
        rows = handle.report().per_site
    assert same(first, second)
    assert same(first, b.packed(config()).outputs)
    assert rows.keys() == b.packed(config()).report.per_site.keys(), "the report is of the last generation alone"
    assert names_in(b.pipe.transformer) == b.names
    assert same(b.call(), b.exact)


@every_bed
def test_offloaded_is_the_same(name):
    run = bed(name).packed(config(offload=True))
    assert same(run.outputs, bed(name).packed(config()).outputs)


@every_bed
def test_an_interrupt_leaves_nothing(name):
    b = bed(name)
    blocks = next(part for part in b.pipe.transformer.modules() if isinstance(part, torch.nn.ModuleList))
    with tqai.apply(b.pipe, config()) as handle:
        seen = []

        def stop(*_: Any) -> None:
            seen.append(handle.nbytes)
            if len(seen) == 3:
                raise KeyboardInterrupt

        watch = blocks[1].register_forward_pre_hook(stop)
        try:
            with pytest.raises(KeyboardInterrupt):
                b.call()
        finally:
            watch.remove()
        assert max(seen) > 0
        assert handle.nbytes == 0
        assert same(b.call(), b.packed(config()).outputs)


@pytest.mark.parametrize("name", ["qwenimage21", "flux2_klein_kv"])
def test_it_goes_with_level_model_in_either_order(name):
    b = bed(name)
    steps = tqai.Config(monitor="fixed:interval=2,min_steps=2")
    outputs, go = [], lambda: b.call(num_inference_steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for first, second in ((steps, config()), (config(), steps)):
            with tqai.apply(b.pipe, first) as one, tqai.apply(b.pipe, second) as two:
                outputs.append(go())
                by_level = {handle_config.level: handle for handle_config, handle in ((first, one), (second, two))}
                assert by_level["model"].report().calls_skipped > 0
                assert by_level["kv"].report().bytes_held_peak > 0
        assert same(*outputs)
        with tqai.apply(b.pipe, steps):
            alone = go()
            with tqai.apply(b.pipe, config()):
                go()
            assert same(go(), alone), "the second handle's removal leaves the first"
    assert 0 < max(nmse(x, y) for x, y in zip(outputs[0], alone, strict=True)) < 1e-3
    assert same(b.call(), b.exact)
    assert names_in(b.pipe.transformer) == b.names


@pytest.mark.slow
def test_wan_animate_keeps_keys_before_their_positions():
    """Its attention is compiled, and its two branches share one cache; a few tokens alone, so everything is packed at once."""
    family = pipelines.family("wan_animate2")
    pipe = heedful(family.pipe())
    exact, names = family.call(pipe, 2, 0), names_in(pipe.transformer)
    found = []
    for bits in (8, 4):
        with tqai.apply(pipe, config(bits, bits, calibrate=0, sink=0)) as handle:
            outputs, report = family.call(pipe, 2, 0), handle.report()
            assert same(family.call(pipe, 2, 0), outputs)
            assert handle.nbytes == 0
        assert len(report.per_site) == 2
        assert all(row["tokens"] == row["tokens_packed"] > 0 for row in report.per_site.values())
        found.append(max(nmse(x, y) for x, y in zip(outputs, exact, strict=True)))
    print(found)
    assert 0 < found[0] < found[1] / 20
    assert found[1] < 1e-2
    assert names_in(pipe.transformer) == names
    assert same(family.call(pipe, 2, 0), exact)


def test_branches_never_mix():
    b = bed("qwenimage21")
    caches: dict[str, Any] = {}
    watch = b.pipe.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: caches.__setitem__(str(id(kwargs["kv_cache"])), kwargs["kv_cache"]), with_kwargs=True
    )
    try:
        b.call()
        exact = [[layer.get() for layer in c.layer_caches] for c in caches.values()]
        caches.clear()
        with tqai.apply(b.pipe, config()):
            b.call()
            packed = [[layer.get() for layer in c.layer_caches] for c in caches.values()]
    finally:
        watch.remove()
    assert len(exact) == len(packed) == 2
    for branch in (0, 1):
        for i, layer in enumerate(packed[branch]):
            for part in (0, 1):
                assert nmse(layer[part], exact[branch][i][part]) < 0.012
                assert nmse(layer[part], exact[1 - branch][i][part]) > 0.3


@pytest.mark.parametrize("name", ["qwenimage21", "flux2_klein_kv"])
def test_outlier_channels_cost_nothing(name):
    """Keys 125 times as large in a few channels, queries as much smaller: the same function, and about the same error."""
    b, at = bed(name), torch.tensor([6, 7, 40, 41])  # pairs of channels that positions turn
    plain = error(b.packed(config()), b)

    def fold(by: float) -> None:
        with torch.no_grad():
            for module_name, module in b.pipe.transformer.named_modules():
                if module_name.endswith(("norm_k", "norm_added_k", "norm_q", "norm_added_q")):
                    module.weight[at] *= by if module_name.endswith("k") else 1 / by

    fold(125.0)
    try:
        folded = b.call()
        assert max(nmse(x, y) for x, y in zip(folded, b.exact, strict=True)) < 1e-8
        with tqai.apply(b.pipe, config()):
            scaled = max(nmse(x, y) for x, y in zip(b.call(), folded, strict=True))
        with tqai.apply(b.pipe, config(calibrate=0)):
            unscaled = max(nmse(x, y) for x, y in zip(b.call(), folded, strict=True))
    finally:
        fold(1 / 125.0)
    print(name, plain, scaled, unscaled)
    assert scaled < 1.26 * plain, "within 1 dB"
    assert unscaled > 3 * scaled


# -- layer caches


LAYERS = {
    "transformer_qwenimage21": "QwenImage21KVLayerCache", "transformer_flux2": "Flux2KVLayerCache",
    "transformer_wan_animate_2": "WanAnimate2KVLayerCache", "transformer_glm_image": "GlmImageLayerKVCache",
    "transformer_sana_wm_refiner": "SanaWMRefinerKVLayerCache",
}  # fmt: skip


def layer_of(module: str) -> Any:
    return getattr(importlib.import_module(f"diffusers.models.transformers.{module}"), LAYERS[module])


def pair(n: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    return rnd(1, n, 2, 64, seed=seed), rnd(1, n, 2, 64, seed=seed + 1)


def slots(**options: Any) -> Slots:
    return Slots(Plan(**{"recent": 0, **options}), 2, True, False, lambda: None, lambda _: None, {"materialised": 0})


def adopted(module: str, layer: Any = None, **options: Any) -> Any:
    layer = layer_of(module)() if layer is None else layer
    stand_in = next(kind.stand_in for kind in kv_caches.KINDS.values() if kind.layer == type(layer).__name__)
    adopt(layer, stand_in, slots(**options))
    return layer


@pytest.mark.parametrize("module", list(LAYERS)[:3])
def test_a_layer_with_one_store(module):
    layer, (k, v) = adopted(module), pair()
    assert isinstance(layer, layer_of(module))
    with pytest.raises(RuntimeError):
        layer.get()
    layer.store(k, v)
    got = layer.get()
    assert all(0 < nmse(x, y) < 0.012 for x, y in zip(got, (k, v), strict=True))
    assert got[0].shape == k.shape
    held = layer.slots.nbytes
    assert held == nbytes(walked(layer)), "nothing else is held"
    layer.unpack()
    assert type(layer) is layer_of(module)
    assert vars(layer).keys() == vars(layer_of(module)()).keys()
    assert same(list(layer.get()), list(got))
    adopted(module, layer)
    assert layer.slots.nbytes <= held * 1.01, "what is there already is packed"
    layer.clear()
    assert layer.slots.nbytes == 0
    with pytest.raises(RuntimeError):
        layer.get()


def walked(thing: Any) -> list[Tensor]:
    """The tensors that our own objects under ``thing`` lead to, but for the tables of coders, which all caches share."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, dict | list | tuple):
        return [x for part in (thing.values() if isinstance(thing, dict) else thing) for x in walked(part)]
    if isinstance(thing, Rows) or not type(thing).__module__.startswith("tqai_core"):
        return []
    return walked(vars(thing))


def test_appended_pictures_are_as_the_original_puts_them():
    plain, layer, own = layer_of("transformer_glm_image")(), adopted("transformer_glm_image"), pair(7, 50)
    for cache_ in (plain, layer):
        for sample_ in range(2):
            for picture_ in range(2):
                cache_.store(*pair(512, 10 * sample_ + 2 * picture_))
            cache_.current_sample_idx += 1
    batch = [x.expand(4, -1, -1, -1) for x in own]
    for got, exact in zip(layer.get(*batch), plain.get(*batch), strict=True):
        assert got.shape == exact.shape == (4, 1031, 2, 64)
        assert torch.equal(got[:, -7:], exact[:, -7:])
        assert [nmse(got[i], exact[i]) < 0.012 for i in range(4)] == [True] * 4
        assert nmse(got[0], exact[3]) > 0.5
    with pytest.raises(ValueError, match="multiple"):
        layer.get(*(x.expand(3, -1, -1, -1) for x in own))
    assert layer.k_caches == layer.v_caches == []
    layer.clear()
    assert layer.slots.nbytes == 0
    assert same(list(layer.get(*own)), list(own))


def test_a_history_is_packed_once_and_cut():
    plain, layer = (make("transformer_sana_wm_refiner") for make in (lambda m: layer_of(m)(), lambda m: adopted(m, recent=64)))
    flat = lambda n, seed: tuple(x.flatten(2).bfloat16() for x in pair(n, seed))
    for cache_ in (plain, layer):
        assert cache_.get_sink() is cache_.get_history() is None
        cache_.store_sink(*flat(512, 0))
        for step in range(6):
            cache_.store_captured_post_rope(*flat(256, 10 + 2 * step))
            new, old = cache_.get_captured_post_rope(), cache_.get_history()
            cache_.store_history(*(new if old is None else (torch.cat(two, 1) for two in zip(old, new, strict=True))))
            cache_.store_history(*(x[:, -1024:] for x in cache_.get_history()))
    for got, exact in zip((*layer.get_sink(), *layer.get_history()), (*plain.get_sink(), *plain.get_history()), strict=True):
        assert got.shape == exact.shape
        assert got.dtype == torch.bfloat16
        assert 0.004 < nmse(got.float(), exact.float()) < 0.012, "that of one packing, not of six"
    assert all(torch.equal(x[:, -64:], y[:, -64:]) for x, y in zip(layer.get_history(), plain.get_history(), strict=True))
    layer.clear()
    assert layer.slots.nbytes == 0
    assert layer.get_sink() is layer.get_history() is None


# -- rows


def test_a_token_packed_again_keeps_its_codes():
    k, v = (x.bfloat16() for x in pair(768))
    for bits in (2, 3, 4, 6, 8):
        first = Prefix.pack(k, v, Plan(bits, bits, recent=0))
        once = first.dense()
        more = [torch.cat([x, y.bfloat16()], 1) for x, y in zip(once, pair(256, 9), strict=True)]
        again = Prefix.pack(*more, Plan(bits, bits, recent=0), known=first).dense()
        assert all(nmse(x[:, :768].float(), y.float()) < 2e-5 for x, y in zip(again, once, strict=True)), bits


@pytest.mark.parametrize(("dim", "tokens", "least"), [(64, 1024, 3.6), (128, 1024, 3.8)])
def test_bytes_in_bf16(dim, tokens, least):
    k, v = (rnd(2, tokens, 3, dim, seed=i).bfloat16() for i in (0, 1))
    prefix = Prefix.pack(k, v, Plan(recent=0), energy(rnd(2, 50, 3, dim), 3))
    assert nbytes([k, v]) >= least * prefix.nbytes
    assert prefix.numbers == k.numel() + v.numel()


def test_decoding_needs_little_above_its_result():
    k, v = (rnd(1, 16_384, 4, 128, seed=i).bfloat16() for i in (0, 1))
    prefix = Prefix.pack(k, v, Plan(recent=0))
    prefix.dense()  # tables are made
    with Live() as live:
        out = prefix.dense()
    assert nbytes([k, v]) == nbytes(list(out)) > prefix.nbytes * 3.8
    assert nbytes(list(out)) < live.peak <= 1.4 * nbytes(list(out))
    assert all(nmse(x.float(), y.float()) < 0.012 for x, y in zip(out, (k, v), strict=True))


def test_values_on_few_axes_get_axes_of_their_own():
    k, axes = pair(2304)[0], rnd(2, 8, 64, seed=3)
    v = (rnd(1, 2, 2304, 8, seed=4) @ axes).transpose(1, 2) + 0.02 * rnd(1, 2304, 2, 64, seed=5)
    prefix = Prefix.pack(k, v, Plan(recent=0))
    assert prefix.tier.coder_v.basis is not None
    assert prefix.nbytes * 3.6 <= 2 * prefix.numbers
    assert float(prefix.error[1]) < 0.6 * 0.0095, "plain rows of 4 bits: .0095"
    assert nmse(prefix.dense()[1], v) == pytest.approx(float(prefix.error[1]), rel=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_as_they_are(bad):
    k, v = pair()
    v[0, 300, 1, 5] = bad
    prefix = Prefix.pack(k, v, Plan(recent=0))
    assert "NaN or inf" in prefix.why
    assert all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(prefix.dense(), (k, v), strict=True))


# -- what is asked for


def test_a_pipeline_without_a_cache_is_told_which_have_one():
    for name in ("qwenimage", "flux2"):  # FLUX.2's transformer could, but its pipeline makes no cache
        pipe = pipelines.family(name).pipe()
        with pytest.raises(tqai.TqaiError, match=r"QwenImage21Pipeline.*Flux2KleinKVPipeline.*GlmImagePipeline"):
            tqai.apply(pipe, config())


def test_what_cannot_be_is_an_error_and_changes_nothing():
    b = bed("flux2_klein_kv")
    with pytest.raises(tqai.TqaiError, match="codec alone"):
        tqai.apply(b.pipe, tqai.Config(level="kv", strategy="delta2"))
    with pytest.raises(tqai.TqaiError, match="4 layers"):
        tqai.apply(b.pipe, config(skip_layers=(9,)))
    with tqai.apply(b.pipe, config()), pytest.raises(tqai.TqaiError, match="already applied"):
        tqai.apply(b.pipe, config())
    assert names_in(b.pipe.transformer) == b.names
    by_pipe = b.packed(config()).outputs
    with tqai.apply(b.pipe.transformer, config()) as handle:
        assert same(b.call(), by_pipe), "a bare transformer"
        assert handle.report().evaluations == STEPS


def test_a_cache_that_is_alive_at_the_end_becomes_plain():
    b, kept = bed("qwenimage21"), {}
    watch = b.pipe.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: kept.__setitem__(id(kwargs["kv_cache"]), kwargs["kv_cache"]), with_kwargs=True
    )
    try:
        with tqai.apply(b.pipe, config()) as handle:
            b.call()
            assert handle.nbytes == handle.report().bytes_held_peak > 0
            first = next(iter(kept.values())).get_layer(0)
            packed = first.get()
    finally:
        watch.remove()
    assert handle.nbytes == 0
    assert {type(layer).__name__ for one in kept.values() for layer in one.layer_caches} == {"QwenImage21KVLayerCache"}
    assert same(list(first.get()), list(packed))


def test_offload_is_an_option_of_level_kv_and_json_stays_readable():
    assert config(offload=True) == tqai.Config.from_json(config(offload=True).to_json())
    assert "offload" not in config().to_json(), "versions before do not know it"
    for wrong in ({"level": "model", "offload": True}, {"level": "kv", "offload": 1}):
        with pytest.raises(tqai.TqaiError, match="offload"):
            tqai.Config(**wrong)
