"""tqai inside diffusers' own pipelines, around the trained minis."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, WanPipeline

import tqai_core as tqai
from tqai_core import minis
from tqai_core.hosts.diffusers import minis as mini_adapter
from tqai_core.hosts.diffusers.schedulers import scheduler
from tqai_core.measure import Mini
from tqai_core.metrics import nmse, psnr
from tqai_core.types import nbytes

KINDS = minis.KINDS
CALLS = {"flux": 2, "sd3": 1, "wan": 2}  # model calls an evaluation


def untouched(model) -> bool:
    return "forward" not in vars(model) and "_reset_stateful_cache" not in vars(model)


@pytest.mark.parametrize("kind", KINDS)
def test_half_the_calls_and_back_bit_for_bit(kind, pipe_of, generate):
    pipe = pipe_of(kind)
    keys = list(pipe.transformer.state_dict())
    exact = generate(pipe, kind)
    with tqai.apply(pipe, tqai.preset("balanced", kind)) as handle:
        fast = generate(pipe, kind)
        report = handle.report()
        assert handle.nbytes == 0, "nothing is held after a run"
        assert torch.equal(generate(pipe, kind), fast), "a second run is the same"
        assert list(pipe.transformer.state_dict()) == keys
    assert report.calls == 24 * CALLS[kind]
    assert report.calls_skipped >= 0.4 * report.calls
    assert report.evaluations == 24
    assert 0 < report.bytes_held_peak < report.bytes_exact
    assert psnr(fast, exact) > 36
    assert not torch.equal(fast, exact)
    assert untouched(pipe.transformer)
    assert torch.equal(generate(pipe, kind), exact)


@pytest.mark.parametrize(("kind", "seeds"), [("flux", (136, 163)), ("sd3", (110, 125, 140)), ("wan", (21, 113))])
def test_one_picture_at_a_time_has_no_bad_tail(kind, seeds):
    """Worst seeds of before: 50.1 (flux), 40.6 to 42.1 (sd3) and 37.3 (wan) dB, by forecasts near the end that nothing corrects."""
    mini = Mini(kind)
    mini.schedule("euler", 1.0)
    for seed in seeds:
        exact, ours = (mini.run([3 * seed % 10], seed, 24, config) for config in (None, tqai.preset("balanced", kind)))
        assert ours.calls <= 0.55 * exact.calls
        assert psnr(ours.latents, exact.latents) > {"flux": 47, "sd3": 46, "wan": 42}[kind], seed
        fewer = mini.run([3 * seed % 10], seed, round(24 * ours.calls / exact.calls))
        assert psnr(ours.latents, exact.latents) > psnr(fewer.latents, exact.latents) + 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", ["unipc", "dpm++"])
def test_multistep_schedulers(kind, scheduler, pipe_of, generate):
    pipe = pipe_of(kind, scheduler, 3.0)
    exact = generate(pipe, kind)
    with tqai.apply(pipe, tqai.preset("balanced", kind)) as handle:
        out = generate(pipe, kind)
        assert handle.report().calls_skipped >= 0.4 * handle.report().calls
    assert nmse(out, exact) < 4e-3
    assert torch.equal(generate(pipe, kind), exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "off",
    [
        tqai.Config(strategy=None),
        tqai.Config(monitor=None),
        tqai.Config(monitor="lyapunov:tau=0"),
        "all layers",
    ],
    ids=["no strategy", "no monitor", "tau 0", "all layers skipped"],
)
def test_off_is_bit_exact(kind, off, pipe_of, generate):
    pipe = pipe_of(kind)
    exact = generate(pipe, kind, steps=16)
    if off == "all layers":
        depth = {"flux": 4, "sd3": 3, "wan": 4}[kind]
        off = tqai.Config(skip_layers=tuple(range(depth)))
    with tqai.apply(pipe, off) as handle, pytest.warns(UserWarning, match="nothing was skipped"):
        assert torch.equal(generate(pipe, kind, steps=16), exact)
    assert handle.report().calls_skipped == 0


def test_some_skip_layers_warn_at_this_level(pipe_of, generate):
    pipe = pipe_of("flux")
    config = tqai.Config(skip_layers=(0, -1))
    with tqai.apply(pipe, config) as handle, pytest.warns(UserWarning, match="skip_layers"):
        generate(pipe, "flux")
    assert any("skip_layers" in text and "transformer_blocks.0" in text for text in handle.report().warnings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_after_an_interrupt_or_an_exception_is_clean(kind, pipe_of, generate):
    pipe = pipe_of(kind)
    with tqai.apply(pipe, tqai.preset("balanced", kind)) as handle:
        want = generate(pipe, kind)

        def stop(p, i, t, kw):
            if i == 9:
                p._interrupt = True
            return kw

        generate(pipe, kind, callback_on_step_end=stop)
        assert handle.report().evaluations == 10
        assert handle.nbytes == 0
        assert torch.equal(generate(pipe, kind), want)

        def boom(p, i, t, kw):
            if i == 9:
                raise KeyboardInterrupt
            return kw

        with pytest.raises(KeyboardInterrupt):
            generate(pipe, kind, callback_on_step_end=boom)
        assert torch.equal(generate(pipe, kind), want)

        block = next(m for m in pipe.transformer.modules() if isinstance(m, torch.nn.ModuleList))[0]
        calls = []

        def fail(*_):
            calls.append(1)
            if len(calls) == 9:
                raise MemoryError("inside the model")

        hook = block.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            generate(pipe, kind)
        hook.remove()
        assert handle.nbytes == 0, "an exception inside the model drops what was held at once"
        assert torch.equal(generate(pipe, kind), want)
    exact = generate(pipe, kind)
    with tqai.apply(pipe, tqai.preset("balanced", kind)):
        generate(pipe, kind, steps=17)
    assert torch.equal(generate(pipe, kind), exact)


def test_true_cfg_branches_have_their_own_history(pipe_of, generate):
    pipe = pipe_of("wan")
    with tqai.apply(pipe, tqai.preset("balanced", "wan")) as handle:
        generate(pipe, "wan")
        sites = handle.report().per_site
    cond, uncond = sites["transformer/model/cond/out"], sites["transformer/model/uncond/out"]
    assert cond["calls"] == uncond["calls"] == 24
    assert cond["skipped"] == uncond["skipped"] > 9, "one decision a step for both"
    # forecasts that mixed the branches would erase guidance: the result must stay far nearer to w=2 than to w=1
    exact, plain = generate(pipe, "wan"), generate(pipe, "wan", guidance=1.0)
    with tqai.apply(pipe, tqai.preset("balanced", "wan")):
        ours = generate(pipe, "wan")
    assert nmse(ours, exact) < 0.05 * nmse(plain, exact)


def two_experts(bias=0.0, boundary=0.5, shift=1.0):
    """WAN 2.2 A14B's set-up: the mini, and the mini with another bias of its outputs."""
    second = mini_adapter.transformer("wan")
    second.proj_out.bias.data += bias
    base = minis.pipeline("wan", scheduler("euler", shift, "wan"))
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=base.transformer,
        transformer_2=second,
        vae=base.vae,
        scheduler=base.scheduler,
        boundary_ratio=boundary,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("steps", [20, 16])
def test_a_second_expert_that_goes_on_alike_costs_no_second_warm_up(generate, steps):
    """WAN 2.2 A14B's own settings (half the steps each, shift 5, guidance 3.5): as many forecasts, and as good, as one model has."""
    pipe, actions, db = two_experts(boundary=0.84, shift=5.0), {}, {}
    for name, boundary in (("one", None), ("two", 0.84)):
        pipe.register_to_config(boundary_ratio=boundary)
        exact = generate(pipe, "wan", steps=steps, guidance=3.5)
        with tqai.apply(pipe, tqai.preset("balanced", "wan")) as handle:
            db[name] = psnr(generate(pipe, "wan", steps=steps, guidance=3.5), exact)
            actions[name] = [d["action"] for d in handle.report().decisions]
            first = next((d for d in handle.report().decisions if d["model"] == "transformer_2"), None)
    assert first["action"] == "compute"
    assert first["why"] == "the other expert's history fits"
    assert 0 < first["error"] < 0.15
    assert abs(actions["two"].count("forecast") - actions["one"].count("forecast")) <= 1
    assert db["two"] > db["one"] - 3
    assert "forecast" in actions["two"][steps // 2 + 1 : steps // 2 + 3], "no second warm-up"


def test_a_history_that_does_not_fit_the_second_expert_is_dropped(generate):
    """Bit for bit as if it had never been: the second expert warms up by itself."""
    pipe = two_experts(bias=0.5)
    with tqai.apply(pipe, tqai.preset("balanced", "wan")) as handle:
        out, report = generate(pipe, "wan", steps=32), handle.report()
        for flow in handle.flows:
            flow.inherit = lambda legacy: None
        assert torch.equal(generate(pipe, "wan", steps=32), out)
        alone = handle.report()
    switch = [d["model"] for d in report.decisions].index("transformer_2")
    first = report.decisions[switch]
    assert first["why"] == "the other expert's history does not fit"
    assert first["error"] > 0.2
    assert alone.decisions[switch]["why"] == "warm-up"
    assert [d["action"] for d in report.decisions] == [d["action"] for d in alone.decisions]
    assert [d["action"] for d in report.decisions[switch : switch + 3]] == ["compute"] * 3


def test_two_experts_have_their_own_memory_and_the_first_is_freed(generate):
    pipe = two_experts(bias=0.02)
    first, second = pipe.transformer, pipe.transformer_2
    exact = generate(pipe, "wan", steps=32)
    with tqai.apply(pipe, tqai.preset("balanced", "wan")) as handle:
        held = []

        def watch(p, i, t, kw):
            held.append([flow.nbytes for flow in handle.flows])
            return kw

        out = generate(pipe, "wan", steps=32, callback_on_step_end=watch)
        report = handle.report()
    switch = next(i for i, (_, b) in enumerate(held) if b)
    assert all(a and not b for a, b in held[:switch])
    assert all(b and not a for a, b in held[switch:-1]), "the first expert's memory is freed when the second starts"
    assert held[-1] == [0, 0], "nobody asks again after the last step"
    by_model = [d["model"] for d in report.decisions]
    assert by_model == ["transformer"] * switch + ["transformer_2"] * (32 - switch)
    assert report.decisions[switch]["action"] == "compute", "the new expert judges the history first"
    assert report.calls_skipped > 16
    assert max(sum(h) for h in held) <= report.bytes_held_peak < 1.01 * max(sum(h) for h in held) + 64
    assert psnr(out, exact) > 36
    assert untouched(first)
    assert untouched(second)
    assert torch.equal(generate(pipe, "wan", steps=32), exact)


def test_heun_is_bypassed_exactly_with_the_reason(pipe_of, generate):
    pipe = pipe_of("sd3")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=1.0)
    exact = generate(pipe, "sd3", steps=16)
    with tqai.apply(pipe) as handle, pytest.warns(UserWarning, match="evaluates a step 2 times"):
        assert torch.equal(generate(pipe, "sd3", steps=16), exact)
    assert handle.report().calls_skipped == 0
    assert "Heun" in handle.report().fallbacks[0]["why"]


@pytest.mark.parametrize("kind", KINDS)
def test_four_steps_warn_instead_of_silence(kind, pipe_of, generate):
    pipe = pipe_of(kind)
    exact = generate(pipe, kind, steps=4)
    with tqai.apply(pipe) as handle, pytest.warns(UserWarning, match="4 steps are too few"):
        assert torch.equal(generate(pipe, kind, steps=4), exact)
    assert any("nothing was skipped" in text for text in handle.report().warnings)


def test_batch_size_and_dtype_may_change_between_runs(pipe_of, generate):
    pipe = copy.deepcopy(pipe_of("flux"))
    pipe.set_progress_bar_config(disable=True)
    one = minis.inputs("flux", [3])
    with tqai.apply(pipe) as handle:
        a = generate(pipe, "flux", **one)
        generate(pipe, "flux")
        assert torch.equal(generate(pipe, "flux", **one), a)
        pipe.to(torch.bfloat16)
        half = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in one.items()}
        b = generate(pipe, "flux", **half)
        assert b.dtype == torch.bfloat16
        assert handle.report().calls_skipped > 15
        assert nmse(b, a) < 2e-3


def test_bf16_timesteps_do_not_confuse_the_clock(pipe_of, generate):
    """At 100 steps bf16 rounds neighbouring timesteps to one value; the scheduler's own index tells them apart."""
    pipe = copy.deepcopy(pipe_of("flux", "euler", 3.0)).to(torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    kw = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in minis.inputs("flux", [1]).items()}
    with tqai.apply(pipe) as handle:
        generate(pipe, "flux", steps=100, **kw)
    assert handle.report().evaluations == 100
    assert set(handle.report().per_site) == {"transformer/model/cond/out", "transformer/model/uncond/out"}


def loop(transformer, labels, steps=24):
    """A sampling loop of one's own, guidance 2, two calls a step without any cache context."""
    tokens, pooled = mini_adapter.prompts("sd3", labels)
    none, none_pooled = mini_adapter.prompts("sd3", [10] * len(labels))
    x = torch.randn(len(labels), 1, 16, 16, generator=torch.Generator().manual_seed(5))
    grid = torch.linspace(1, 0, steps + 1)
    with torch.no_grad():
        for now, then in pairwise(grid):
            v = [
                transformer(hidden_states=x, timestep=(now * 1000).expand(len(x)), encoder_hidden_states=t, pooled_projections=p).sample
                for t, p in ((tokens, pooled), (none, none_pooled))
            ]
            x = x + (then - now) * (v[1] + 2 * (v[0] - v[1]))
    return x


def test_a_bare_transformer_in_a_loop_of_ones_own():
    model = mini_adapter.transformer("sd3")
    exact = loop(model, [2, 5])
    with tqai.apply(model, tqai.preset("balanced", "sd3"), steps=24) as handle:
        first, second = loop(model, [2, 5]), loop(model, [2, 5])
        report = handle.report()
    assert torch.equal(first, second), "the second generation starts anew"
    assert report.calls == 48
    assert report.calls_skipped >= 18
    assert report.decisions[-1]["why"] == "last step"
    assert psnr(first, exact) > 36
    assert torch.equal(loop(model, [2, 5]), exact)


def test_a_bare_transformer_without_steps_stays_exact_and_says_the_cure():
    model = mini_adapter.transformer("sd3")
    exact = loop(model, [2])
    with tqai.apply(model) as handle:
        assert torch.equal(loop(model, [2]), exact)
    assert "steps=N" in handle.report().fallbacks[0]["why"]


def test_slg_like_extra_calls_stay_exact(pipe_of, generate):
    """SD3's skip-layer guidance calls the transformer once more on some steps: an own stream, never mixed in."""
    pipe = pipe_of("sd3")
    kw = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.6)
    exact = generate(pipe, "sd3", **kw)
    with tqai.apply(pipe, tqai.preset("balanced", "sd3")) as handle:
        out = generate(pipe, "sd3", **kw)
        report = handle.report()
    assert psnr(out, exact) > 34
    extra = [v for k, v in report.per_site.items() if "call1" in k]
    assert len(extra) == 1
    assert extra[0]["skipped"] == 0
    assert any("appeared after the first evaluation" in f["why"] for f in report.fallbacks)


class NotATransformer(torch.nn.Linear):
    pass


NotATransformer.__module__ = "diffusers.models.fake"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda p: tqai.apply(object()), ["object", "FluxPipeline"]),
        (lambda p: tqai.apply(torch.nn.Linear(2, 2)), ["Linear", "transformer"]),
        (lambda p: tqai.apply(NotATransformer(2, 2)), ["NotATransformer", "no denoiser", "timestep"]),
        (
            lambda p: tqai.apply(NotATransformer(2, 2), tqai.Config(level="block")),
            ["NotATransformer", "WanTransformer3DModel", "level 'model'"],
        ),
        (lambda p: tqai.apply(p, tqai.Config(skip_layers=(4,))), ["4 asked", "4 blocks", "0 to 3"]),
        (lambda p: tqai.apply(p, "balanced"), ["str", "preset"]),
        (lambda p: tqai.apply(p.transformer, steps=0), ["steps=0"]),
        (lambda p: tqai.apply(p.scheduler), ["transformer"]),
    ],
)
def test_bad_targets_leave_the_model_as_it_was(call, words, pipe_of):
    pipe = pipe_of("flux")
    with pytest.raises(ValueError) as error:
        call(pipe)
    for word in words:
        assert word in str(error.value)
    assert untouched(pipe.transformer)


def test_a_second_apply_is_refused_and_the_first_goes_on(pipe_of, generate):
    pipe = pipe_of("flux")
    with tqai.apply(pipe) as handle:
        with pytest.raises(ValueError, match=r"already applied.*remove\(\)"):
            tqai.apply(pipe.transformer, steps=24)
        generate(pipe, "flux")
        assert handle.report().calls_skipped > 0
    handle.remove()  # again: harmless
    assert untouched(pipe.transformer)


def test_a_neighbours_hook_survives(pipe_of, generate):
    from diffusers.hooks import HookRegistry, ModelHook

    class Count(ModelHook):
        n = 0

        def pre_forward(self, module, *args, **kwargs):
            self.n += 1
            return args, kwargs

    model = pipe_of("flux").transformer
    pipe = pipe_of("flux")
    registry = HookRegistry.check_if_exists_or_initialize(model)
    handle = tqai.apply(pipe)
    counter = Count()
    registry.register_hook(counter, "count")
    generate(pipe, "flux", steps=16)
    handle.remove()
    exact = generate(pipe, "flux", steps=16)
    assert counter.n == 64
    registry.remove_hook("count", recurse=False)
    del model._diffusers_hook
    vars(model).pop("forward", None)
    assert torch.equal(generate(pipe, "flux", steps=16), exact)


def test_the_report_tells_what_happened(pipe_of, generate):
    pipe = pipe_of("sd3")
    with tqai.apply(pipe, tqai.preset("fast", "sd3")) as handle:
        assert handle.report().warnings == ["nothing has run yet"]
        generate(pipe, "sd3")
        report = handle.report()
    assert set(report.to_dict()) == {
        "calls", "calls_skipped", "evaluations", "decisions", "bytes_held_peak", "bytes_exact", "seconds_cpu", "per_site",
        "warnings", "fallbacks", "calls_half",
    }  # fmt: skip
    assert len(report.decisions) == 24
    computed = [d for d in report.decisions if d["action"] == "compute"]
    assert len(computed) == report.calls - report.calls_skipped
    assert all(d["error"] is not None for d in computed[2:])
    assert report.seconds_cpu > 0
    text = report.to_markdown()
    assert "forecast" in text
    assert f"{report.calls_skipped} (" in text
    import json

    assert json.loads(report.to_json())["calls"] == 24


def test_schedulers_that_are_no_flow_schedulers_are_left_exact_with_the_reason(pipe_of, generate):
    """DDIM has no step_index; EulerDiscrete has sigmas up to 14."""
    import diffusers

    pipe = pipe_of("sd3")
    for made, why in ((diffusers.DDIMScheduler(), "tells no sigma"), (diffusers.EulerDiscreteScheduler(), "no flow-matching schedule")):
        pipe.scheduler = made
        exact = generate(pipe, "sd3", 20)
        with tqai.apply(pipe) as handle:
            assert torch.equal(generate(pipe, "sd3", 20), exact)
            report = handle.report()
        assert report.evaluations == 20
        assert [why in f["why"] for f in report.fallbacks] == [True]


def test_a_transformer_compiled_as_a_whole_is_refused_with_the_cure(pipe_of):
    pipe = pipe_of("sd3")
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        tqai.apply(torch.compile(pipe.transformer))


def test_a_transformer_compiled_as_a_whole_after_us_decides_as_before_and_the_report_says_so(pipe_of, generate):
    """Cut into graphs by our decisions, 13 in place of 26 steps were forecast, and nothing said so."""
    pipe = pipe_of("flux")
    plain = pipe.transformer
    with tqai.apply(pipe, tqai.preset("balanced", "flux")) as handle:
        eager, calls = generate(pipe, "flux"), handle.report().calls_skipped
        assert not handle.report().warnings
        try:
            for compiled in (torch.compile(plain, backend="eager"), plain):
                if compiled is plain:
                    plain.compile(backend="eager")
                pipe.transformer = compiled
                with pytest.warns(UserWarning, match="compiled as a whole after tqai"):
                    assert torch.equal(generate(pipe, "flux"), eager)
                assert handle.report().calls_skipped == calls
                assert [("compile_repeated_blocks" in text) for text in handle.report().warnings] == [True]
        finally:
            pipe.transformer, plain._compiled_call_impl = plain, None
            torch.compiler.reset()
        plain.compile_repeated_blocks(backend="eager")
        assert torch.equal(generate(pipe, "flux"), eager)
        assert not handle.report().warnings
        for block in (*plain.transformer_blocks, *plain.single_transformer_blocks):
            block._compiled_call_impl = None


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("level", ["model", "attention"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_outside_of_the_transformer_leaves_nothing_held(level, bare, error, pipe_of, generate):
    """A callback that raises, or the interrupt key: nobody calls the transformer's hooks, and pipelines reset them at their end alone."""
    pipe, held = pipe_of("wan"), []
    config = tqai.Config(level=level, monitor="fixed:interval=2")
    with tqai.apply(pipe.transformer if bare else pipe, config) as handle:
        whole = generate(pipe, "wan", steps=16)

        def stop(p, i, t, kw):
            held.append(handle.nbytes)
            if i == 9:
                raise error("stop")
            return kw

        with pytest.raises(error, match="stop"):
            generate(pipe, "wan", steps=16, callback_on_step_end=stop)
        assert held[-1] > 1000
        assert handle.nbytes == 0
        kept = list(vars(pipe.transformer._diffusers_hook)["hooks"].values())
        assert nbytes([vars(hook.flow) for hook in kept]) == 0, "walked: no tensor is left in the flow"
        assert torch.equal(generate(pipe, "wan", steps=16), whole)


def test_a_pipeline_run_while_another_error_is_handled_is_no_failure(pipe_of, generate):
    pipe = pipe_of("sd3")
    with tqai.apply(pipe) as handle:
        once, calls = generate(pipe, "sd3"), handle.report().calls
        try:
            raise MemoryError
        except MemoryError:
            assert torch.equal(generate(pipe, "sd3"), once)
        assert handle.report().calls == calls
        assert not handle.recorder.running
