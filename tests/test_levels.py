"""Levels block and attention: on the trained minis, on tiny models of every class, compiled, offloaded, adapted."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

import tqai_core as tqai
from tqai_core import minis, site
from tqai_core.attention.token_order import TileOrder
from tqai_core.hosts.diffusers import sites
from tqai_core.metrics import nmse
from tqai_core.registry import REGISTRY, names

ALL = ("sd3", "sd35", "flux", "flux2", "wan", "wan_i2v")
STEPS = 8
HALF = "fixed:interval=2,min_steps=1"


def sigmas(steps=STEPS):
    return [1 - i / steps for i in range(steps)]


def loop(call, branches=1, steps=STEPS):
    return [call(sigma, branch) for sigma in sigmas(steps) for branch in range(branches)]


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def clean(model):
    return not [k for m in model.modules() for k in vars(m) if k.startswith("_tqai")] and "forward" not in vars(model)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("level", ["block", "attention"])
@pytest.mark.parametrize("strategy", ["delta2", "tiered"])
def test_every_class_skips_half_and_comes_back(kind, level, strategy, tiny):
    model, call = tiny(kind)
    exact, keys = loop(call), list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    with tqai.apply(model, tqai.Config(level=level, strategy=strategy, monitor=HALF), steps=STEPS) as handle:
        out = loop(call)
        assert list(model.state_dict()) == keys
    report = handle.report()
    sites = [row for site, row in report.per_site.items() if site.endswith("/out")]
    assert len(sites) >= 2
    assert {(row["calls"], row["skipped"]) for row in sites} == {(STEPS, 2)}, "three are warm-up, the last is computed"
    assert (report.calls, report.calls_skipped) == (STEPS * len(sites), 2 * len(sites))
    held = sum(row["bytes_held_peak"] for site, row in report.per_site.items() if "text" not in site)
    assert 0 < held < report.bytes_exact
    assert held <= report.bytes_held_peak
    assert handle.nbytes == 0
    assert not same(out, exact)
    assert nmse(torch.stack(out), torch.stack(exact)) < 1e-3
    assert same(loop(call), exact)
    assert [type(m) for m in model.modules()] == classes
    assert clean(model)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("level", ["block", "attention"])
def test_shown_but_never_skipped_is_bit_exact(kind, level, tiny):
    """Also where WAN's text keys and values are projected once and used again."""
    model, call = tiny(kind)
    exact = loop(call, 2)
    with tqai.apply(model, tqai.Config(level=level, monitor="fixed:interval=1,min_steps=1"), steps=STEPS) as handle:
        assert same(loop(call, 2), exact)
    assert handle.report().calls_skipped == 0
    assert handle.report().bytes_held_peak > 0


@pytest.mark.parametrize("kind", ["wan", "wan_i2v"])
def test_text_is_projected_once_a_branch(kind, tiny):
    model, call = tiny(kind)
    counts = []
    model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: counts.append(1))
    loop(call, 2)
    assert len(counts) == 2 * STEPS
    counts.clear()
    with tqai.apply(model, tqai.Config(level="attention", monitor="fixed:interval=1,min_steps=1"), steps=STEPS):
        first = loop(call, 2)
        assert len(counts) == 2
        with pytest.warns(UserWarning, match="nothing was skipped"):
            assert same(loop(call, 2), first)
        assert len(counts) == 4, "a new generation projects anew"


@pytest.mark.parametrize("kind", ALL)
def test_the_processor_door(kind, tiny):
    model, call = tiny(kind)
    exact = loop(call)
    before = dict(model.attn_processors)
    config = tqai.Config(level="attention", monitor=HALF)
    processors = tqai.attn_processors(model, config, steps=STEPS)
    handle = processors.handle
    assert len({id(p) for p in processors.values()}) == len({type(p) for p in before.values()}), "one shared object for each class"
    model.set_attn_processor(processors)
    out = loop(call)
    assert handle.report().calls_skipped > 0
    handle.remove()
    assert same(loop(call), exact)
    assert [type(p) for p in model.attn_processors.values()] == [type(p) for p in before.values()]
    with tqai.apply(model, config, steps=STEPS):
        assert same(loop(call), out), "both doors do the same"
    with pytest.raises(ValueError, match="level='attention'"):
        tqai.attn_processors(model, tqai.Config())


@pytest.mark.parametrize("kind", minis.KINDS)
def test_the_processor_door_in_a_pipeline_knows_the_schedule(kind, pipe_of, generate):
    pipe = pipe_of(kind, "unipc", 3.0)
    exact = generate(pipe, kind)
    config = tqai.Config(level="attention", codec="turbo:bits=6", monitor="fixed:interval=2")
    processors = tqai.attn_processors(pipe.transformer, config)
    handle = processors.handle
    pipe.transformer.set_attn_processor(processors)
    out = generate(pipe, kind)
    handle.remove()
    decisions = handle.report().decisions
    assert len(decisions) == 24
    assert decisions[-1]["why"] == "last step"
    assert handle.report().calls_skipped >= 0.4 * handle.report().calls
    assert nmse(out, exact) < 2e-3
    assert torch.equal(generate(pipe, kind), exact)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("level", ["block", "attention"])
def test_skip_layers_stay_exact(kind, level, tiny):
    """A protected layer is computed in every call, and nothing of it is held."""
    model, call = tiny(kind, layers=3)
    depth = 6 if kind.startswith("flux") else 3
    name = "transformer_blocks.1" if not kind.startswith("wan") else "blocks.1"
    for layers, kept in (((0, -1), {0, depth - 1}), (("0-1",), {0, 1}), ((name,), {1})):
        with tqai.apply(model, tqai.Config(level=level, monitor=HALF, skip_layers=layers), steps=STEPS) as handle:
            loop(call)
        held = {int(site.split("/")[1].rsplit(".", 1)[1]) for site in handle.report().per_site if "text" not in site}
        assert held == set(range(depth)) - kept
    exact = loop(call)
    with tqai.apply(model, tqai.Config(level=level, monitor=HALF, skip_layers=(f"0-{depth - 1}",)), steps=STEPS):
        assert same(loop(call), exact)


def test_an_unknown_layer_name_is_an_error_that_shows_one(tiny):
    model, _ = tiny("wan")
    with pytest.raises(ValueError, match=r"blocks\.0.*attn1"):
        tqai.apply(model, tqai.Config(level="block", skip_layers=("blocks.7",)), steps=STEPS)
    assert clean(model)


@pytest.mark.parametrize("scorer", [None, "bsa:block=4"])
@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_window(kind, scorer, tiny):
    model, call = tiny(kind)
    exact = loop(call)
    errors = {}
    for density in (0.25, 1.0):
        strategy = {"name": "window", "density": density, "block": 4}
        config = tqai.Config(level="attention", scorer=scorer, strategy=strategy, monitor=HALF, codec="exact")
        with tqai.apply(model, config, steps=STEPS) as handle:
            out = loop(call)
        assert handle.report().calls_skipped > 0
        errors[density] = nmse(torch.stack(out), torch.stack(exact))
    assert errors[1.0] < 1e-9, "full density is full attention"
    assert 1e-9 < errors[0.25] < 1e-3
    assert same(loop(call), exact)
    assert clean(model)


@pytest.mark.parametrize("strategy", ["delta2", "window:block=4"])
@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_computed_steps_take_the_faster_dense_attention_in_bf16(kind, strategy, tiny, monkeypatch):
    """Within the rounding of bf16; one switch makes them the model's own bits, and a backend that the user chose stays."""
    from tqai_core.attention import dense

    model, call = tiny(kind, dtype=torch.bfloat16)
    exact = loop(call)
    used = []
    monkeypatch.setattr(dense, "choice", lambda q, k, v: "sdpa" if dense.off() or q.dtype != torch.bfloat16 else "products")
    inner = dense.products
    monkeypatch.setattr(dense, "products", lambda *a: used.append(1) or inner(*a))
    config = tqai.Config(level="attention", strategy=strategy, monitor="fixed:interval=1,min_steps=1")
    with tqai.apply(model, config, steps=STEPS) as handle:
        out = loop(call)
    assert handle.report().calls_skipped == 0
    assert len(used) >= STEPS
    assert nmse(torch.stack(out), torch.stack(exact)) < 1e-3
    assert same(loop(call), exact)
    monkeypatch.setenv("TQAI_DENSE", "sdpa")
    with tqai.apply(model, config, steps=STEPS):
        assert same(loop(call), exact)
    monkeypatch.delenv("TQAI_DENSE")
    if kind != "sd3":  # its processor knows torch's own alone
        from diffusers.models.attention_dispatch import attention_backend

        used.clear()
        with attention_backend("flex"), tqai.apply(model, config, steps=STEPS):
            loop(call)
        assert not used


@pytest.mark.parametrize("strategy", ["window:block=4,density=0.25", "window:block=4,density=0.25,far=clusters", "window:queries=4"])
@pytest.mark.parametrize("kind", ALL)
def test_window_works_on_every_class(kind, strategy, tiny):
    model, call = tiny(kind)
    exact = loop(call)
    with tqai.apply(model, tqai.Config(level="attention", strategy=strategy, monitor=HALF), steps=STEPS) as handle:
        out = loop(call)
    report = handle.report()
    assert report.calls_skipped > 0
    assert not same(out, exact)
    assert nmse(torch.stack(out), torch.stack(exact)) < 1e-3
    judged = [site["far"] for site in report.per_site.values() if "far" in site]
    assert bool(judged) == ("queries" not in strategy)
    if max(judged, default=0) > 1:
        assert "far field: off in" in report.to_markdown()
    assert same(loop(call), exact)
    assert clean(model)


@pytest.mark.parametrize("kind", ALL)
def test_tokens_laid_out_once_a_call(kind, tiny):
    """The same as in each attention, but for the order of sums; and nothing of it stays."""
    model, call = tiny(kind)
    exact = loop(call)
    outs, moved = {}, []
    inner = TileOrder.apply
    for lay in ("layer", "call"):
        config = tqai.Config(level="attention", strategy=f"window:block=4,density=0.25,far=none,lay={lay}", monitor=HALF, codec="exact")
        with pytest.MonkeyPatch.context() as patch, tqai.apply(model, config, steps=STEPS) as handle:
            patch.setattr(TileOrder, "apply", lambda self, x, dim, lay=lay: moved.append(lay) or inner(self, x, dim))
            outs[lay] = loop(call)
        assert handle.report().calls_skipped > 0
    error, gap = (nmse(torch.stack(outs["call"]), torch.stack(other)) for other in (exact, outs["layer"]))
    assert gap < 1e-3 * error
    assert moved.count("call") < moved.count("layer")
    assert same(loop(call), exact)
    assert clean(model)
    assert not [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


def test_what_another_model_adds_to_the_tokens_keeps_them_in_raster(tiny):
    model, call = tiny("flux")
    config = tqai.Config(level="attention", strategy="window:block=4,density=0.25,lay=call", monitor=HALF, codec="exact")
    plain = tqai.Config(level="attention", strategy="window:block=4,density=0.25", monitor=HALF, codec="exact")
    outs = []
    for chosen in (config, plain):
        with tqai.apply(model, chosen, steps=STEPS) as handle:
            outs.append(loop(lambda *a: call(*a, controlnet_block_samples=[torch.ones(2, 64, 32)])))
        assert handle.report().calls_skipped > 0
    assert same(*outs)


def test_a_far_field_that_errs_more_than_none_is_switched_off_and_said(tiny, monkeypatch):
    from tqai_core.strategies import window

    model, call = tiny("wan")
    inner = window.block_attention

    def spoiled(*args):
        return inner(*args) * (3 if args[6] else 1)

    monkeypatch.setattr(window, "block_attention", spoiled)
    config = tqai.Config(level="attention", strategy="window:block=4,residual=0", monitor=HALF, codec="exact")
    with tqai.apply(model, config, steps=STEPS) as handle:
        out = loop(call)
    judged = [site["far"] for site in handle.report().per_site.values() if "far" in site]
    assert judged
    assert min(judged) > 1
    assert "far field: off in 2 of 2 attentions" in handle.report().to_markdown()
    plain = tqai.Config(level="attention", strategy="window:block=4,far=none,residual=0", monitor=HALF, codec="exact")
    with tqai.apply(model, plain, steps=STEPS):
        assert same(loop(call), out), "as if it had none"


@pytest.mark.parametrize("order", [0, 1])
def test_the_support_is_that_of_the_first_full_attention_or_of_the_last(order, tiny, monkeypatch):
    """A residual of order 0 has no history that another support would break."""
    from tqai_core.scorers.bsa import Bsa

    model, call = tiny("wan")
    inner, chosen = Bsa.mass, []
    monkeypatch.setattr(Bsa, "mass", lambda self, *a: chosen.append(len(a) == 4) or inner(self, *a))  # not for a score
    config = tqai.Config(level="attention", strategy=f"window:block=4,residual={order}", scorer="bsa", monitor=HALF, codec="exact")
    with tqai.apply(model, config, steps=STEPS) as handle:
        loop(call)
    report = handle.report()
    assert report.calls_skipped > 0
    assert sum(chosen) == (report.calls - report.calls_skipped if order == 0 else report.calls // report.evaluations)


@pytest.mark.parametrize("level", ["model", "block", "attention"])
@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_stability_sees_the_attention_at_every_level(kind, level, tiny):
    model, call = tiny(kind)
    exact = loop(call)
    with tqai.apply(model, tqai.Config(level=level, monitor="stability:tau=1,min_steps=1"), steps=STEPS) as handle:
        loop(call)
    whys = [d["why"] for d in handle.report().decisions]
    assert "attention is stable" in whys
    with tqai.apply(model, tqai.Config(level=level, monitor="stability:tau=0,min_steps=1"), steps=STEPS) as handle:
        assert same(loop(call), exact), "measuring changes nothing"
    assert clean(model)


def test_entropy_of_uniform_attention_is_one_and_of_one_token_zero():
    q = torch.zeros(1, 2, 32, 8)
    k = torch.randn(1, 2, 32, 8)
    assert torch.allclose(site.entropy(q, k), torch.ones(2), atol=1e-4)
    k[:, :, 5] = 100.0
    assert site.entropy(q + 1, k).abs().max() < 1e-4


@pytest.mark.parametrize("kind", minis.KINDS)
@pytest.mark.parametrize("level", ["model", "attention"])
def test_the_guidance_difference_spares_uncond_calls(kind, level, pipe_of, generate):
    if kind == "sd3" and level == "attention":
        pytest.skip("one batch of both branches: see the fallback test")
    pipe = pipe_of(kind)
    exact = generate(pipe, kind)
    rows = {}
    for cfg in ("none", "difference"):
        with tqai.apply(pipe, tqai.Config(level=level, strategy=f"delta2:cfg={cfg}", monitor="fixed:interval=1")) as handle:
            out = generate(pipe, kind)
        rows[cfg] = handle.report(), nmse(out, exact)
    assert rows["none"][0].calls_skipped == 0
    report, error = rows["difference"]
    assert 0.17 <= report.calls_skipped / report.calls <= 0.25, "about half of the uncond calls"
    assert all("uncond" in site for site, row in report.per_site.items() if row["skipped"])
    assert 0 < error < 1e-3


def test_the_guidance_difference_in_one_batch_at_level_attention_says_why_not(pipe_of, generate):
    pipe = pipe_of("sd3")
    with tqai.apply(pipe, tqai.Config(level="attention", strategy="delta2:cfg=difference", monitor="fixed:interval=2")) as handle:
        generate(pipe, "sd3")
    assert any("one batch" in f["why"] for f in handle.report().fallbacks)


def test_state_is_kept_per_branch(tiny):
    """PAB keeps one state for both guidance calls: its error is then 58 to 70 times larger."""
    model, call = tiny("wan")
    exact = loop(call, 2)
    config = tqai.Config(level="attention", strategy="delta", codec="exact", monitor=HALF)
    with tqai.apply(model, config, steps=STEPS) as handle:
        ours = loop(call, 2)
    assert {site.split("/")[2] for site in handle.report().per_site} == {"call0", "call1"}
    error = nmse(torch.stack(ours), torch.stack(exact))

    class Mixed(sites.ModuleSite):
        def where(self, kind, branch):
            return super().where(kind, "one for all")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tqai_core.hosts.diffusers.attach.ModuleSite", Mixed)
        with tqai.apply(model, config, steps=STEPS):
            mixed = nmse(torch.stack(loop(call, 2)), torch.stack(exact))
    assert mixed > 10 * error


@pytest.mark.parametrize("level", ["block", "attention"])
@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_compiled_blocks_no_break_and_no_recompile_in_later_steps(kind, level, tiny):
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    model, call = tiny(kind, layers=4)
    config = tqai.Config(level=level, monitor=HALF)
    with tqai.apply(model, config, steps=STEPS) as handle:
        want = loop(call)
    eager = loop(call)
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounter()
    with tqai.apply(model, config, steps=STEPS) as handle:
        if kind == "sd3":  # diffusers has not named its repeated blocks
            for block in model.transformer_blocks:
                block.compile(backend=counter, fullgraph=True)
        else:
            model.compile_repeated_blocks(backend=counter, fullgraph=True)
        try:
            out = [call(sigma) for sigma in sigmas()[:5]]
            graphs = counter.frame_count
            out += [call(sigma) for sigma in sigmas()[5:]]
            assert counter.frame_count == graphs, "later steps compile nothing"
        finally:
            for m in model.modules():
                m._compiled_call_impl = None
            torch._dynamo.reset()
        assert handle.report().calls_skipped > 0
    assert not counters["graph_break"]
    kinds_of_block = 2 if kind == "flux" else 2 if kind == "sd3" else 1  # SD3's last block differs from the others
    assert graphs <= 3 * kinds_of_block
    assert same(out, want) or nmse(torch.stack(out), torch.stack(want)) < 1e-8
    assert same(loop(call), eager)


@pytest.mark.parametrize("level", ["block", "attention"])
@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_block_offload_first(kind, level, tiny):
    """Hooks on the blocks themselves stand in front of the class that level block puts there."""
    from diffusers.hooks import apply_group_offloading

    config = tqai.Config(level=level, monitor=HALF)
    model, call = tiny(kind)
    with tqai.apply(model, config, steps=STEPS):
        want = loop(call)
    model, call = tiny(kind)
    apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    )
    exact = loop(call)
    with tqai.apply(model, config, steps=STEPS) as handle:
        assert same(loop(call), want)
        assert handle.report().calls_skipped > 0
    assert same(loop(call), exact)


def _group_offload(model):
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def _model_offload(model):
    """What ``enable_model_cpu_offload`` puts on a transformer."""
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(model, execution_device=torch.device("cpu"))


def _sequential_offload(model):
    """What ``enable_sequential_cpu_offload`` puts on it: weights are on ``meta`` until a module's own forward."""
    from accelerate import cpu_offload

    cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert any(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize("level", ["model", "block", "attention"])
@pytest.mark.parametrize("offload", [_group_offload, _model_offload, _sequential_offload])
@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_offload_before_and_after(kind, offload, level, tiny):
    from accelerate.hooks import remove_hook_from_module

    config = tqai.Config(level=level, monitor=HALF)
    model, call = tiny(kind)
    with tqai.apply(model, config, steps=STEPS):
        want = loop(call)
    for first in (True, False):
        model, call = tiny(kind)
        exact = loop(call)
        if first:
            offload(model)
        with tqai.apply(model, config, steps=STEPS) as handle:
            if not first:
                offload(model)
            assert same(loop(call), want), f"offload {'before' if first else 'after'} apply"
            assert handle.report().calls_skipped > 0
        assert same(loop(call), exact), "the offload still works after remove"
        remove_hook_from_module(model, recurse=True)
        assert not [k for m in model.modules() for k in vars(m) if k.startswith("_tqai")]


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_a_pipeline_offloaded_by_accelerate_skips_as_before(kind):
    from tqai_core.hosts.diffusers import minis as adapter

    config = tqai.Config(level="attention", monitor="fixed:interval=2", codec="turbo:bits=6")

    def run(pipe):
        inputs = adapter.inputs(kind, [3], 2.0)
        generator = torch.Generator().manual_seed(0)
        return pipe(**inputs, num_inference_steps=16, generator=generator, output_type="latent", return_dict=False)[0]

    pipe = adapter.pipeline(kind)
    with tqai.apply(pipe, config):
        want = run(pipe)
    pipe = adapter.pipeline(kind)
    pipe.enable_model_cpu_offload(device="cpu")
    with tqai.apply(pipe, config) as handle:
        assert torch.equal(run(pipe), want)
        assert handle.report().calls_skipped > 0
        assert handle.nbytes == 0


@pytest.mark.parametrize("level", ["block", "attention"])
@pytest.mark.parametrize("kind", ["sd3", "flux", "wan"])
def test_lora_stays_in_force(kind, level, tiny):
    peft = pytest.importorskip("peft")
    model, call = tiny(kind)
    plain = loop(call)
    torch.manual_seed(5)
    lora = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    model.add_adapter(lora)
    model.requires_grad_(False)
    exact = loop(call)
    assert not same(exact, plain)
    with tqai.apply(model, tqai.Config(level=level, monitor="fixed:interval=1,min_steps=1"), steps=STEPS):
        assert same(loop(call), exact)
    with tqai.apply(model, tqai.Config(level=level, monitor=HALF), steps=STEPS) as handle:
        assert nmse(torch.stack(loop(call)), torch.stack(exact)) < 2e-3
        assert handle.report().calls_skipped > 0


def test_ip_adapter_keeps_its_weights_and_its_arguments(tiny):
    """Flux with IP-Adapter: the processor is a module with weights and a third output."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model, call = tiny("flux")
    torch.manual_seed(2)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=12, num_tokens=(3,), scale=[1.0]))
    model.requires_grad_(False)
    picture = [torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(3))]
    keys = list(model.state_dict())

    def with_picture(*args, **kwargs):
        return type(model).forward(model, *args, joint_attention_kwargs={"ip_hidden_states": picture, "ip_adapter_masks": None}, **kwargs)

    model.forward = with_picture
    exact = loop(call)
    picture.append(picture.pop() * 0)
    assert not same(loop(call), exact), "the picture has a say"
    picture[0] = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(3))
    for monitor in ("fixed:interval=1,min_steps=1", HALF):
        with tqai.apply(model, tqai.Config(level="attention", monitor=monitor), steps=STEPS) as handle:
            out = loop(call)
            assert list(model.state_dict()) == keys
            assert nmse(torch.stack(out), torch.stack(exact)) < 1e-3
            assert (handle.report().calls_skipped > 0) == (monitor == HALF)
            if monitor != HALF:
                assert same(out, exact)


def test_fused_projections_that_drop_our_processors_are_noticed(pipe_of, generate):
    pipe = pipe_of("sd3")
    exact = generate(pipe, "sd3")
    before = dict(pipe.transformer.attn_processors)
    with tqai.apply(pipe, tqai.Config(level="attention", monitor="fixed:interval=2")):
        pipe.transformer.fuse_qkv_projections()
        try:
            with pytest.warns(UserWarning, match="fuse_qkv_projections"):
                generate(pipe, "sd3")
        finally:
            pipe.transformer.unfuse_qkv_projections()
    pipe.transformer.set_attn_processor(before)
    assert torch.equal(generate(pipe, "sd3"), exact)


@pytest.mark.parametrize("level", ["block", "attention"])
@pytest.mark.parametrize("kind", ALL)
def test_an_exception_or_interrupt_leaves_nothing(kind, level, tiny):
    model, call = tiny(kind)
    with tqai.apply(model, tqai.Config(level=level, monitor=HALF), steps=STEPS) as handle:
        want = loop(call)
        for error in (RuntimeError, KeyboardInterrupt):
            count = [0]

            def stop(*_, count=count, error=error):
                count[0] += 1
                if count[0] == 5:
                    raise error

            last = (getattr(model, "blocks", None) or model.transformer_blocks)[-1]
            hook = last.register_forward_pre_hook(stop)
            with pytest.raises(error):
                loop(call)
            hook.remove()
            assert handle.nbytes == 0
            assert same(loop(call), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", ["block", "attention"])
@pytest.mark.parametrize("kind", minis.KINDS)
def test_half_precision(kind, level, dtype, pipe_of, generate):
    from tqai_core.hosts.diffusers import minis as adapter

    pipe = adapter.pipeline(kind).to(dtype)
    over = {k: v.to(dtype) for k, v in adapter.inputs(kind, [1]).items() if isinstance(v, torch.Tensor)}
    exact = generate(pipe, kind, steps=16, **over)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with tqai.apply(pipe, tqai.Config(level=level, monitor="fixed:interval=2")) as handle:
            out = generate(pipe, kind, steps=16, **over)
    assert handle.report().calls_skipped > 0
    assert bool(torch.isfinite(out).all())
    assert nmse(out, exact) < 0.02


TRIPLES = list(itertools.product([None, *names("scorer")], names("strategy"), names("monitor")))
# family, level and type take turns, so that each pair of methods meets all of them
MATRIX = [(*triple, ("sd3", "flux", "wan")[(i + i // 3) % 3], i // 2) for i, triple in enumerate(TRIPLES)]


@pytest.mark.parametrize("scorer, strategy, monitor, kind, turn", MATRIX)
def test_every_triple_runs_in_a_real_transformer(scorer, strategy, monitor, kind, turn, tiny, fisher_file):
    levels = [level for level in REGISTRY["strategy"][strategy].levels if level != "kv"]
    level, dtype = levels[turn % len(levels)], (torch.float32, torch.bfloat16)[turn // len(levels) % 2]
    model, call = tiny(kind, dtype=dtype)
    scorer = {"name": scorer, "file": fisher_file} if scorer == "fisher" else scorer
    known = REGISTRY["monitor"][monitor].options()
    loose = {"tau": 1.0 if monitor == "stability" else 4.0, "max_gap": 1, "min_steps": 1, "steps": (0, 1, 2, 4, 6), "total": STEPS}
    chosen = {"name": monitor} | {name: value for name, value in loose.items() if name in known}
    config = tqai.Config(scorer=scorer, strategy=strategy, monitor=chosen, level=level)
    exact = loop(call)
    with tqai.apply(model, config, steps=STEPS) as handle:
        out = loop(call)
    assert all(x.dtype == dtype and bool(torch.isfinite(x).all()) for x in out)
    assert handle.report().calls_skipped > 0, handle.report().decisions
    assert handle.report().bytes_held_peak > 0
    assert nmse(torch.stack(out), torch.stack(exact)) < 0.1, "eight coarse steps of a random model"
    assert same(loop(call), exact)
