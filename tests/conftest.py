"""Make ``tqai_core`` importable from a bare checkout, last on the path: our ``nodes`` must never win over ComfyUI's."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("tqai_core") is None:
    sys.path.append(str(ROOT))
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "tests")]  # the benches, and what tests share

import torch  # noqa: E402

torch.set_num_threads(1)
COUNT = {"flux": 2, "sd3": 2, "wan": 1}
if "mutmut" in sys.modules:  # make mutate: it knows nodes.run by its path, the host loads it as <the pack's name>.nodes.run
    from mutmut.mutation import trampoline

    _wrap, _hit = trampoline.wrap_in_trampoline, trampoline.record_trampoline_hit

    def _plain(name: str) -> str:
        return re.sub(r"^tqai_pack_\w+\.", "", name)

    def _wrap_by_path(*args: Any, **kw: Any) -> Any:
        def decorate(function: Any) -> Any:
            function.__module__ = _plain(function.__module__)
            return _wrap(*args, **kw)(function)

        return decorate

    trampoline.wrap_in_trampoline = _wrap_by_path
    trampoline.record_trampoline_hit = lambda name, **kw: _hit(_plain(name), **kw)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def lloyd_max() -> dict[int, float]:
    """Bits -> NMSE of the best scalar quantiser of Gaussian numbers (Max 1960, table I; from 7 bits on Panter and Dite's
    ``pi sqrt(3) / 2 * 4 ** -bits``). Shannon's bound is ``4 ** -bits``."""
    table = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499, 6: 0.0006442}
    return table | {bits: math.pi * 3**0.5 / 2 * 4.0**-bits for bits in (7, 8)}


@pytest.fixture(scope="session")
def fisher_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of 6 layers, 2 heads and 4 sigma bands; layer 1, head 1 is the sensitive one, low sigma the sensitive time."""
    from safetensors.torch import save_file

    table = torch.ones(6, 2, 2, 4) * torch.tensor([0.1, 0.2, 0.4, 1.0])
    table[1, 1] *= 10
    path = tmp_path_factory.mktemp("fisher") / "table.safetensors"
    save_file({"fisher": table, "sigmas": torch.tensor([1.0, 0.7, 0.4, 0.1])}, str(path))
    return str(path)


@pytest.fixture(scope="session")
def _pipes() -> dict[str, Any]:
    from tqai_core import minis

    return {kind: minis.pipeline(kind) for kind in minis.KINDS}


@pytest.fixture
def pipe_of(_pipes: dict[str, Any]) -> Callable[..., Any]:
    """The mini pipeline of a kind with a fresh scheduler. Shared: a test that patches it must undo."""
    from tqai_core.hosts.diffusers.schedulers import scheduler

    def give(kind: str, name: str = "euler", shift: float = 1.0) -> Any:
        pipe = _pipes[kind]
        assert "forward" not in vars(pipe.transformer), "an earlier test left its patch behind"
        pipe.scheduler = scheduler(name, shift, kind)
        return pipe

    return give


@pytest.fixture
def generate() -> Callable[..., torch.Tensor]:
    """Latents of a few digits from a pipeline; the same noise for the same seed."""
    from tqai_core import minis

    def go(pipe: Any, kind: str, steps: int = 24, seed: int = 0, guidance: float = 2.0, **over: Any) -> torch.Tensor:
        kw = {**minis.inputs(kind, list(range(COUNT[kind])), guidance), **over}
        generator = torch.Generator().manual_seed(seed)
        return pipe(**kw, num_inference_steps=steps, generator=generator, output_type="latent", return_dict=False)[0]

    return go


@pytest.fixture
def tiny() -> Callable[..., Any]:
    """A small random transformer of any supported class and a function of (sigma, branch) that calls it."""

    def make(kind: str, layers: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, Callable[..., torch.Tensor]]:
        import diffusers

        torch.manual_seed(seed)
        g = torch.Generator().manual_seed(1)
        rnd = lambda *size: torch.randn(*size, generator=g)
        if kind in ("sd3", "sd35"):
            model = diffusers.SD3Transformer2DModel(
                sample_size=16, patch_size=2, in_channels=4, num_layers=layers, attention_head_dim=16, num_attention_heads=2,
                caption_projection_dim=32, joint_attention_dim=24, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16,
                qk_norm="rms_norm" if kind == "sd35" else None, dual_attention_layers=(0,) if kind == "sd35" else (),
            )  # fmt: skip
            x, scale = rnd(2, 4, 16, 16), 1000
            text = [dict(encoder_hidden_states=rnd(2, 5, 24), pooled_projections=rnd(2, 16)) for _ in range(2)]
        elif kind == "flux":
            model = diffusers.FluxTransformer2DModel(
                patch_size=1, in_channels=8, num_layers=layers, num_single_layers=layers, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=24, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
            )  # fmt: skip
            ids = torch.zeros(64, 3)
            ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
            same = dict(img_ids=ids, txt_ids=torch.zeros(5, 3))
            x, scale = rnd(2, 64, 8), 1
            text = [dict(encoder_hidden_states=rnd(2, 5, 24), pooled_projections=rnd(2, 16), **same) for _ in range(2)]
        elif kind == "flux2":
            model = diffusers.Flux2Transformer2DModel(
                patch_size=1, in_channels=8, num_layers=layers, num_single_layers=layers, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=24, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
            )  # fmt: skip
            ids = torch.zeros(64, 4)
            ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
            x, scale = rnd(2, 64, 8), 1
            same = dict(img_ids=ids, txt_ids=torch.zeros(5, 4), guidance=torch.ones(2))
            text = [dict(encoder_hidden_states=rnd(2, 5, 24), **same) for _ in range(2)]
        else:
            image = dict(image_dim=20, added_kv_proj_dim=32) if kind == "wan_i2v" else {}
            model = diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
                freq_dim=16, ffn_dim=64, num_layers=layers, cross_attn_norm=True, rope_max_seq_len=32, **image,
            )  # fmt: skip
            x, scale = rnd(2, 4, 3, 8, 8), 1000
            words = 512 if kind == "wan_i2v" else 5
            text = [dict(encoder_hidden_states=rnd(2, words, 24)) for _ in range(2)]
            if kind == "wan_i2v":
                for t in text:
                    t["encoder_hidden_states_image"] = rnd(2, 7, 20)
        model = model.eval().requires_grad_(False)
        for p in model.parameters():  # zero-initialised outputs would hide everything
            if p.abs().max() == 0:
                p.normal_(0, 0.05, generator=g)
        noise = rnd(*x.shape)
        model = model.to(dtype)
        same_type = lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        text = [{k: v if k.endswith("_ids") else same_type(v) for k, v in t.items()} for t in text]

        def call(sigma: float, branch: int = 0, **over: Any) -> torch.Tensor:
            now = ((1 - sigma) * x + sigma * noise).to(dtype)
            t = torch.full((2,), sigma * scale)
            with torch.no_grad():
                return model(hidden_states=now, timestep=t, return_dict=False, **text[branch], **over)[0]

        return model, call

    return make


@pytest.fixture
def sampler_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a calibrated sampler that nobody calibrated: small weights on a stock grid."""

    def write(path: Path | None = None, steps: int = 6, **over: Any) -> Path:
        from tqai_core.calibrate.multistep import grid
        from tqai_core.calibrate.sampler import CalibratedSampler, guidance_range

        theta = [[0.01 * (i + 1), 0.02 if i else 0.0, -0.01 if i > 1 else 0.0, 0.005] for i in range(steps)]
        fields: dict[str, Any] = dict(
            models={"transformer": "0" * 16}, model_class="SD3Transformer2DModel", entry=None, grid="shift 2", nodes=grid(steps, 2.0)[:-1],
            theta=theta, form="all", guidance=guidance_range("guidance_scale", 4.5), calls=steps, teacher={"calls": 100, "shift": 2.0},
            seeds={"fit": (1,), "held_out": (2,)}, shape=(16, 16, 16), versions={},
            held_out={"error": 1e-4, "before_last": 1e-4, "stock": {"name": "ab2", "shift": 1.0, "error": 4e-4, "before_last": 2e-4}},
        )  # fmt: skip
        path = path or tmp_path / "made.json"
        CalibratedSampler(**(fields | over)).save(path)
        return path

    return write


# --- ComfyUI: two fake profiles here; one real checkout where TQAI_COMFYUI names it (test_comfyui.py starts that) ---------
sys.path.append(str(ROOT / "tests/comfyui"))
REAL = os.environ.get("TQAI_COMFYUI")


@pytest.fixture(scope="session", params=["real"] if REAL else ["0.15.1", "0.33.0"])
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A ComfyUI with our pack loaded; see tests/comfyui/hosts.py."""
    import hosts

    folder = tmp_path_factory.mktemp("comfyui")
    if REAL:
        yield hosts.real(REAL, folder)
        return
    with hosts.fake(request.param, folder) as made:
        yield made


# --- the README's table of ComfyUI: what the tests marked `shows` found, written where TQAI_SHOWN names a file -------------
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shows(row): a line of the README's ComfyUI table; {name} is a parameter's value")
    config.stash[SHOWN] = {}


SHOWN = pytest.StashKey[dict[str, dict[str, Any]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    mark = item.get_closest_marker("shows")
    if mark is not None and (report.when == "call" or not report.passed):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        row = item.config.stash[SHOWN].setdefault(mark.args[0].format(**params), {"passed": 0, "failed": 0, "skipped": 0, "figures": []})
        row[report.outcome] += 1
        row["figures"] += [value for name, value in report.user_properties if name == "figure"]
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if "TQAI_SHOWN" in os.environ:
        Path(os.environ["TQAI_SHOWN"]).write_text(json.dumps(session.config.stash[SHOWN]))


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., Any]:
    """Makes a tokenizer of single bytes, which a folder keeps and any model of 256 tokens can read."""

    def make(template: str | None = None) -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        made.chat_template = template
        return made

    return make


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a StableDiffusion3Pipeline with random weights, two tiny CLIPs and no T5."""
    folder = tmp_path_factory.mktemp("sd3")
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={c: i for i, c in enumerate(letters)}, merges=[], model_max_length=77)
    clip = lambda: CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(letters), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
            bos_token_id=52, eos_token_id=53, pad_token_id=53,
        )
    )  # fmt: skip
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, out_channels=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, pos_embed_max_size=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        sample_size=32, block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, shift_factor=0.0,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=clip(),
        text_encoder_2=clip(), tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Callable[..., Any]) -> Path:
    """A tiny random Qwen2 with a tokenizer of bytes and a chat template."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=256, hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
            max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("lm")
    model.save_pretrained(folder)
    byte_tokenizer(TEMPLATE).save_pretrained(folder)
    return folder
