"""Beside ComfyUI's own nodes, and with the trained minis: on a real checkout only (see test_comfyui.py)."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tqai_core.metrics import nmse

pytestmark = pytest.mark.skipif("TQAI_COMFYUI" not in os.environ, reason="needs a real ComfyUI")
KINDS = ("flux", "sd3", "wan")
LABELS = {"flux": [0, 1, 2, 3, 4], "sd3": [0, 1, 2, 3, 4], "wan": [1, 7]}
STEPS = 24


def forecasts(report: dict[str, Any]) -> int:
    return sum(d["action"] == "forecast" for d in report["decisions"])


@pytest.fixture(scope="module")
def mini(host):
    """A trained mini with the plain schedule it was trained for, and a sampler of digits."""
    import convert
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    def load(kind: str) -> Any:
        m = host.load(f"mini_{kind}")
        return m if kind == "flux" else ModelSamplingSD3().patch(m, 1.0, 1000)[0]

    def conds(kind: str, labels: list[int]) -> Any:
        text, pooled = convert.conditioning(kind, labels)
        return [[text, {} if pooled is None else {"pooled_output": pooled}]]

    def noise(kind: str, count: int, seed: int = 0) -> torch.Tensor:
        shape = (16, 9, 16, 16) if kind == "wan" else (16, 16, 16)
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))

    def draw(
        m: Any, kind: str, seed: int = 0, steps: int = STEPS, cfg: float = 2.0, labels: list[int] | None = None, sigmas: Any = None,
        **inpaint: Any,
    ) -> torch.Tensor:  # fmt: skip
        labels = LABELS[kind] if labels is None else labels
        latents = host.sample(
            m, f"mini_{kind}", steps=steps, cfg=cfg, positive=conds(kind, labels), negative=conds(kind, [10] * len(labels)),
            noise=noise(kind, len(labels), seed), sigmas=sigmas, **inpaint,
        )  # fmt: skip
        return latents[:, :1]  # the other channels are padding

    load.draw, load.noise = draw, noise
    return load


@pytest.mark.shows("trained minis: PSNR of balanced, here / by diffusers")
@pytest.mark.parametrize("kind", KINDS)
def test_minis_draw_their_digits_as_well_as_in_diffusers(host, mini, kind, record_property):
    """Same weights, noise and schedule in both doors: the digits, the calls and the PSNR agree."""
    import tqai_core as tqai
    from tqai_core import minis
    from tqai_core.metrics import psnr
    from tqai_core.minis import digits

    labels = LABELS[kind]
    m, pipe = mini(kind), minis.pipeline(kind)
    pipe(**minis.inputs(kind, labels, 2.0), num_inference_steps=STEPS, output_type="latent")  # sets the pipeline's own schedule
    sigmas = pipe.scheduler.sigmas.clone()
    plain = mini.draw(m, kind, sigmas=sigmas)
    read = digits.read(plain)
    wanted = torch.tensor(labels).repeat_interleave(9 if kind == "wan" else 1)
    assert (read == wanted).float().mean() >= (0.8 if kind == "wan" else 1.0)
    on = host.compress(m)
    ours, report = mini.draw(on, kind, sigmas=sigmas), host.report()
    start = mini.noise(kind, len(labels))[:, :1]
    if kind == "flux":
        start = pipe._pack_latents(start, len(labels), 1, 16, 16)

    def theirs() -> torch.Tensor:
        from tqai_core.hosts.diffusers.minis import pixels

        out = pipe(
            **minis.inputs(kind, labels, 2.0), num_inference_steps=STEPS, latents=start, output_type="latent", return_dict=False
        )[0]  # fmt: skip
        return pixels(kind, out.float())

    exact = theirs()
    assert psnr(plain, exact) > 60, "the converted mini is not the same model"
    with tqai.apply(pipe, tqai.preset("balanced", kind)) as handle:
        other = theirs()
        there = handle.report()
    here, reference = psnr(ours, plain), psnr(other, exact)
    there_share, here_share = there.calls_skipped / there.calls, report["calls_skipped"] / report["calls"]
    record_property("figure", f"{kind} {here:.1f} / {reference:.1f} dB, {here_share:.0%} / {there_share:.0%} skipped")
    assert abs(here - reference) <= 1.0 or here > reference
    assert abs(here_share - there_share) <= 2.5 / STEPS
    assert (digits.read(ours) == read).float().mean() >= 0.9


def inner_iterations(model: Any, x: torch.Tensor, sigmas: Any, extra_args: Any = None, callback: Any = None, disable: Any = None, **kw):
    """Three evaluations at each sigma, with a little noise between them, as inpainting samplers do it."""
    g = torch.Generator().manual_seed(5)
    for now, then in itertools.pairwise(sigmas.tolist()):
        for again in (True, True, False):
            denoised = model(x, now * x.new_ones(x.shape[0]), **(extra_args or {}))
            if again:
                x = x + 0.02 * now * torch.randn(x.shape, generator=g)
        x = x + (x - denoised) / now * (then - now)
    return x


@pytest.mark.shows("inpainting: half of a digit given; with inner iterations at a sigma")
@pytest.mark.parametrize(("kind", "inner"), [("flux", False), ("sd3", False), ("wan", False), ("flux", True)])
def test_inpainting(host, mini, kind, inner, record_property):
    """The given half stays as it is, the other half is closer to the exact run than fewer steps, or the whole run is exact."""
    import comfy.samplers

    from tqai_core.metrics import psnr

    m = mini(kind)
    shape = mini.noise(kind, 2).shape
    given = m.model.process_latent_out(torch.zeros(shape) + 0.5 * mini.noise(kind, 1, 3).expand(shape))
    mask = torch.zeros(2, 1, *shape[2:])
    mask[..., shape[-1] // 2 :] = 1.0
    sampler = comfy.samplers.KSAMPLER(inner_iterations) if inner else "euler"
    draw = lambda which, steps=STEPS: mini.draw(which, kind, steps=steps, labels=[1, 7], latent=given, mask=mask, sampler=sampler)
    plain, ours = draw(m), draw(host.compress(m))
    report = host.report()
    count, calls = forecasts(report), report["evaluations"]
    kept = m.model.process_latent_in(given)[:, :1]
    half = (..., slice(0, shape[-1] // 2))
    torch.testing.assert_close(ours[half], kept[half], rtol=0, atol=1e-5)
    assert torch.equal(ours[half], plain[half])
    if not count:
        assert torch.equal(ours, plain)
        assert report["fallbacks"] or report["warnings"]
        return
    fewer = draw(m, max(STEPS - count * STEPS // calls, 2))
    figures = f"{count} of {calls}: {psnr(ours, plain):.1f} / {psnr(fewer, plain):.1f} dB"
    record_property("figure", f"{kind}{', inner' if inner else ''} {figures}")
    assert inner or count >= 8
    assert psnr(ours, plain) > psnr(fewer, plain)
    repeats = [d for a, d in itertools.pairwise(report["decisions"]) if a["sigma"] == d["sigma"] and d["action"] == "forecast"]
    assert all(d["error_estimate"] > 0 for d in repeats), "a repeat is estimated to be without error"


class Watch:
    """CPU time spent inside some functions and outside of what they call on to."""

    def __init__(self) -> None:
        self.own = self.inner = 0.0

    def around(self, wrapper: Any) -> Any:
        def timed(executor: Any, *args: Any, **kwargs: Any) -> Any:
            proxy = Proxy(executor, self)
            before, began = self.inner, time.thread_time()
            try:
                return wrapper(proxy, *args, **kwargs)
            finally:
                self.own += time.thread_time() - began - (self.inner - before)
                self.inner = before

        return timed


class Proxy:
    def __init__(self, executor: Any, watch: Watch) -> None:
        self.executor, self.watch, self.class_obj = executor, watch, executor.class_obj

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, began = self.watch.inner, time.thread_time()
        try:
            return self.executor(*args, **kwargs)
        finally:
            self.watch.inner = before + time.thread_time() - began


@pytest.mark.shows("CPU time a node adds that skips nothing: idle; watching")
@pytest.mark.parametrize("kind", KINDS)
def test_overhead_of_skipping_nothing(host, mini, kind, record_property):
    """CPU time in our own code, as a part of the rest of the run. Idle: nothing may be forecast (tau 0, short schedules, all
    blocks exact). Watching: steps are judged and held, but their errors are too large.

    The minis are the worst case of watching: a step takes milliseconds, and ComfyUI's 16 channels make their latents 16
    times as large as they are.
    """
    m, shares = mini(kind), {}
    for name, tau in (("idle", 0.0), ("watching", 1e-9)):
        on, watch = host.compress(m, host.pipeline("lyapunov", tau=tau)), Watch()
        for wrappers in on.wrappers.values():
            wrappers["tqai"] = [watch.around(wrapper) for wrapper in wrappers["tqai"]]
        ratios = []
        for _ in range(4):
            gc.collect()
            gc.disable()  # a collection of the host's whole heap would count for whoever allocates next
            watch.own, began = 0.0, time.thread_time()
            mini.draw(on, kind, labels=[3], steps=16)
            ratios.append(watch.own / (time.thread_time() - began - watch.own))
            gc.enable()
        shares[name] = min(ratios[1:])
    record_property("figure", f"{kind} {100 * shares['idle']:.1f} %; {100 * shares['watching']:.0f} %")
    assert shares["idle"] <= 0.02
    assert shares["watching"] < 0.5


@pytest.mark.shows("core EasyCache on the same model: ours steps aside")
def test_core_easycache_switches_us_off(host):
    from comfy_extras.nodes_easycache import EasyCacheNode

    m = host.load("wan22_5b")
    both = EasyCacheNode.execute(host.compress(m, host.pipeline()), 50.0, 0.0, 0.99, False).result[0]
    alone = EasyCacheNode.execute(m, 50.0, 0.0, 0.99, False).result[0]
    assert torch.equal(host.sample(both, "wan22_5b"), host.sample(alone, "wan22_5b"))
    assert "EasyCache" in host.report()["fallbacks"][0]["why"]


@pytest.mark.shows("skipped of 8 steps on SD3: ours / core EasyCache")
def test_sd3_is_skipped_where_core_easycache_does_nothing(host, record_property):
    from comfy_extras.nodes_easycache import EasyCacheNode

    m = host.load("sd3")
    skipped = []
    for on in (host.compress(m, host.pipeline(min_steps=8)), EasyCacheNode.execute(m, 50.0, 0.0, 0.99, False).result[0]):
        with host.forwards(m) as ran:
            host.sample(on, "sd3", steps=8)
        skipped.append(8 - len(ran))
    record_property("figure", f"{skipped[0]} / {skipped[1]}")
    assert skipped[0] >= 2
    assert skipped[1] == 0, "core learned it: say so in the README"


@pytest.mark.shows("skip-layer guidance")
def test_core_skip_layer_guidance(host):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    m = SkipLayerGuidanceDiT.execute(host.load("sd3"), 3.0, 0.0, 0.5, "1", "").result[0]
    x = host.sample(host.compress(m, host.pipeline()), "sd3")
    report = host.report()
    assert torch.isfinite(x).all()
    assert forecasts(report) >= 6
    assert report["per_site"]["sd3/model/cond#2/out"]["calls"] < report["per_site"]["sd3/model/cond/out"]["calls"]


@pytest.mark.shows("context windows")
@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_core_context_windows(host, schedule):
    """Windows that stay have a history each; a step that meets a new window is computed."""
    import inspect

    from comfy_extras import nodes_context_windows as nodes

    execute = nodes.ContextWindowsManualNode.execute
    wanted = dict(
        context_length=2, context_overlap=1, context_schedule=schedule, context_stride=1, closed_loop=False, dim=2, freenoise=False,
        fuse_method="pyramid",
    )  # fmt: skip
    known = inspect.signature(execute).parameters
    m = execute(host.load("wan_14b_high"), **{k: v for k, v in wanted.items() if k in known}).result[0]
    noise = torch.randn(1, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = host.sample(m, "wan_14b_high", noise=noise)
    x = host.sample(host.compress(m, host.pipeline()), "wan_14b_high", noise=noise)
    report = host.report()
    fewer = host.sample(m, "wan_14b_high", noise=noise, steps=20 - forecasts(report))
    assert (x - plain).norm() < (fewer - plain).norm(), "closer than as many steps without tqai"
    if schedule == "standard_static":
        assert forecasts(report) >= 7
        assert sum(site.startswith("wan/model/cond@") for site in report["per_site"]) >= 3
    else:
        assert forecasts(report) < 7
        assert sum("history" in d["why"] for d in report["decisions"]) >= 3


@pytest.mark.shows("torch.compile (eager backend), {order}")
@pytest.mark.parametrize("order", ["before us", "after us"])
def test_core_torch_compile(host, order):
    import torch._dynamo
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def compiled(m: Any) -> Any:
        made = m.clone()
        set_torch_compile_wrapper(made, backend="eager")
        return made

    m = host.load("sd3")
    ways = {"before us": lambda pipeline: host.compress(compiled(m), pipeline), "after us": lambda p: compiled(host.compress(m, p))}
    plain = host.sample(compiled(m), "sd3")
    torch._dynamo.utils.counters.clear()
    x, report = host.sample(ways[order](host.pipeline()), "sd3"), host.report()
    assert torch.isfinite(x).all()
    assert forecasts(report) >= 7
    assert torch.equal(x, host.sample(host.compress(m, host.pipeline()), "sd3"))
    assert torch.equal(host.sample(ways[order](host.pipeline("lyapunov", tau=1e-9)), "sd3"), plain)


@pytest.mark.shows("img2img, denoise 0.5")
@pytest.mark.parametrize("name", ["flux", "sd3", "wan22_5b"])
def test_img2img_by_the_hosts_own_sampler(host, name):
    import comfy.sample

    m = host.load(name)
    latent = 0.5 * host.noise(name, 9)

    def draw(which: Any) -> torch.Tensor:
        return comfy.sample.sample(
            which, host.noise(name), 20, 4.0, "euler", "simple", host.conds(name, 1), host.conds(name, 2), latent, denoise=0.5,
            disable_pbar=True, seed=0,
        )  # fmt: skip

    plain, on = draw(m), host.compress(m, host.pipeline())
    with host.forwards(m) as ran:
        x = draw(on)
    report = host.report()
    assert report["evaluations"] == 20
    assert forecasts(report) >= 7
    assert len(ran) == 20 - forecasts(report)
    assert torch.isfinite(x).all()
    assert not torch.equal(x, plain)
    assert torch.equal(draw(on), x)
    assert torch.equal(draw(host.compress(m, host.pipeline("lyapunov", tau=1e-9))), plain)


@pytest.mark.shows("LoRA, {order}")
@pytest.mark.parametrize("order", ["before us", "after us"])
def test_lora(host, order):
    import comfy.sd

    m, g = host.load("sd3"), torch.Generator().manual_seed(0)
    key = "diffusion_model.joint_blocks.0.x_block.attn.qkv"
    out, inner = m.model.state_dict()[f"{key}.weight"].shape
    file = {f"{key}.lora_up.weight": torch.randn(out, 4, generator=g), f"{key}.lora_down.weight": 0.1 * torch.randn(4, inner, generator=g)}
    lora = lambda model: comfy.sd.load_lora_for_models(model, None, file, 1.0, 0.0)[0]
    plain, bent = host.sample(m, "sd3"), host.sample(lora(m), "sd3")
    assert not torch.equal(plain, bent)
    way = (lambda p: host.compress(lora(m), p)) if order == "before us" else (lambda p: lora(host.compress(m, p)))
    x, report = host.sample(way(host.pipeline()), "sd3"), host.report()
    assert forecasts(report) >= 7
    assert (x - bent).abs().mean() < (x - plain).abs().mean()
    assert torch.equal(host.sample(way(host.pipeline("lyapunov", tau=1e-9)), "sd3"), bent)
    assert torch.equal(host.sample(m, "sd3"), plain), "the model without the LoRA changed"


@pytest.mark.shows("two devices at once (core's multi-GPU threads)")
def check_forecasts_of(host: Any, m: Any, plain: torch.Tensor) -> None:
    """Half of the steps forecast, close to ``plain``, which is the exact run of ``m``; nothing skipped is ``plain`` itself."""
    x, report = host.sample(host.compress(m, host.pipeline()), "sd3"), host.report()
    assert forecasts(report) >= 7
    assert (x - plain).square().mean() < 0.1 * plain.square().mean()
    assert torch.equal(host.sample(host.compress(m, host.pipeline("lyapunov", tau=1e-9)), "sd3"), plain)


def test_weights_in_fp8(host):
    """As the loader's weight_dtype fp8_e4m3fn has them."""
    m = host.load("sd3", dtype=torch.float8_e4m3fn)
    assert torch.float8_e4m3fn in {p.dtype for p in m.model.diffusion_model.parameters()}
    plain = host.sample(m, "sd3")
    assert not torch.equal(plain, host.sample(host.load("sd3"), "sd3"))
    check_forecasts_of(host, m, plain)


def test_weights_that_come_from_host_memory_layer_by_layer(host, monkeypatch):
    """The host's low-memory way: most layers are cast when they are used."""
    from comfy.model_patcher import ModelPatcher

    usual, m = host.sample(host.load("sd3"), "sd3"), host.load("sd3")
    load, loads = ModelPatcher.load, []

    def in_little_memory(self: Any, device: Any, lowvram_model_memory: int = 0, **options: Any) -> Any:
        loads.append(device)
        return load(self, device, lowvram_model_memory=1, **{**options, "full_load": False})

    monkeypatch.setattr(ModelPatcher, "load", in_little_memory)
    plain = host.sample(m, "sd3")
    assert loads
    assert m.model.model_lowvram
    assert torch.allclose(plain, usual, atol=1e-5)
    check_forecasts_of(host, m, plain)


@pytest.mark.parametrize("level", ["model", "attention"])
def test_two_devices_at_once(host, level):
    """ComfyUI's own threads run cond and uncond at the same time, on one state of ours. Two batches of one are rounded otherwise than
    one of two: that much differs with exact copies. A rounding may flip a code, and then the codec errs otherwise, but not more."""
    copies = {"codec": "exact"}
    (one, two), (exact_one, exact_two) = in_one_batch_and_in_two_threads(host, level), in_one_batch_and_in_two_threads(host, level, copies)
    assert nmse(exact_two, exact_one) < 1e-12
    assert nmse(two, one) < 2 * nmse(one, exact_one), "two draws of the codec's error"


def in_one_batch_and_in_two_threads(host: Any, level: str, codec: dict[str, str] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    import comfy.patcher_extension as extension
    import comfy.sd

    if not hasattr(extension.CallbacksMP, "ON_DEEPCLONE_MULTIGPU"):
        pytest.skip("this version runs on one device")
    import comfy.multigpu
    from comfy.model_patcher import create_model_options_clone

    base = comfy.sd.load_diffusion_model(str(host.folder / "tiny_sd3.safetensors"))
    over = {"level": level} if codec is None else {"level": level, "codec": codec}
    one = host.sample(host.compress(base, host.pipeline(), **over), "sd3")
    report = host.report()
    both = host.compress(base, host.pipeline(), **over)
    devices = torch.device("cpu"), torch.device("cpu", 0)
    second = both.deepclone_multigpu(new_load_device=devices[1])
    second.is_multigpu_base_clone = True

    def threads(executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider, pool = executor.class_obj, comfy.multigpu.MultiGPUThreadPool(list(devices))
        options = guider.model_options
        guider.model_options = create_model_options_clone(options)
        second.pre_run()
        guider.model_options |= {"multigpu_clones": dict(zip(devices, (both, second), strict=True)), "multigpu_thread_pool": pool}
        try:
            return executor(*args, **kwargs)
        finally:
            pool.shutdown()
            guider.model_options = options

    both.add_wrapper_with_key(extension.WrappersMP.OUTER_SAMPLE, "devices", threads)
    with host.forwards(base) as ran:
        two = host.sample(both, "sd3")
    assert set(ran) == {1}, "cond and uncond ran in one batch"
    figures = lambda r: {site: (s["calls"], s["skipped"]) for site, s in r["per_site"].items()}
    assert figures(host.report()) == figures(report)
    assert forecasts(host.report()) >= 7
    return one, two


@pytest.mark.shows("another node that replaces the attention")
def test_cores_own_attention_node_after_us(host):
    """Level attention is never called then: exact, and the report says why."""
    from comfy_extras import nodes_model_advanced as nodes

    m = host.load("sd3")
    if not hasattr(nodes, "ModelAttentionBackend"):
        pytest.skip("this version has no such node")
    taken = nodes.ModelAttentionBackend().patch(host.compress(m, host.pipeline(), level="attention"), "pytorch attention")[0]
    assert torch.equal(host.sample(taken, "sd3"), host.sample(nodes.ModelAttentionBackend().patch(m, "pytorch attention")[0], "sd3"))
    host.sample(taken, "sd3")
    assert "another node replaced the attention" in host.report()["fallbacks"][0]["why"]


def test_another_node_that_replaces_attention(host):
    """Level model does not touch attention, so a replaced one changes nothing for us."""
    m = host.load("flux").clone()
    m.model_options["transformer_options"]["optimized_attention_override"] = lambda func, *a, **k: func(*a, **k)
    assert torch.equal(
        host.sample(host.compress(m, host.pipeline()), "flux"), host.sample(host.compress(host.load("flux"), host.pipeline()), "flux")
    )
    assert forecasts(host.report()) >= 7


@pytest.mark.shows("no tensor more after three runs than after one")
def test_no_tensor_outlives_a_run(host):
    """Counted over everything that the garbage collector knows, not over what we think we hold."""

    def alive() -> int:
        gc.collect()
        return sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor)

    m = host.load("sd3")
    on = host.compress(m, host.pipeline())
    host.sample(on, "sd3")
    before = alive()
    for _ in range(3):
        host.sample(on, "sd3")
    assert alive() <= before


@pytest.mark.shows("import of the pack: CPU time, lines printed")
def test_import_is_quick_and_quiet(tmp_path, record_property):
    code = """
import sys, time
sys.path.insert(0, sys.argv[1]); root = sys.argv[2]; sys.argv = ["main.py", "--cpu"]
import comfy.options; comfy.options.enable_args_parsing()
import utils.install_util, comfy.sd, comfy.samplers, comfy_api.latest, folder_paths, PIL.ImageDraw, importlib.util
import gc; gc.collect(); gc.disable()  # a collection of the host's whole heap would count for whoever allocates next
print("BEGIN"); began = time.process_time()
spec = importlib.util.spec_from_file_location("tqai_pack", root + "/__init__.py", submodule_search_locations=[root])
pack = sys.modules["tqai_pack"] = importlib.util.module_from_spec(spec); spec.loader.exec_module(pack)
for cls in pack.NODE_CLASS_MAPPINGS.values(): cls.INPUT_TYPES()
print("TOOK", time.process_time() - began)
"""
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-c", code, os.environ["TQAI_COMFYUI"], str(root)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    said, _, took = run.stdout.partition("BEGIN")[2].partition("TOOK")
    lines = [line for line in [*said.splitlines(), *run.stderr.splitlines()] if line.strip() and (line in said or "tqai" in line)]
    record_property("figure", f"{float(took):.2f} s, {len(lines)}")
    assert float(took) < 0.3
    assert len(lines) <= 1, lines
