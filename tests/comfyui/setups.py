"""Small random models of everything that ComfyUI samples, made by its own classes: what people run, one :class:`Setup` each.

Sizes are the smallest that the classes take; names of options are those of ComfyUI's model detection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]
# the first layer behind the waves of the time, by its name in the classes of ComfyUI
FIRST = ("in_layer.weight", "linear_1.weight", "mlp.0.weight", "time_embedding.0.weight", "proj_in.weight")
LAST = ("final_layer", "proj_out", "head.head", "distilled_guidance", "norm_out")


@dataclass(frozen=True)
class Setup:
    """One model and the conditions that it is asked with.

    Attributes:
        config: class in ``comfy.supported_models``, which makes the model.
        options: of the transformer.
        latents: one shape, or one for each stream (video, audio).
        text: width of the text's features; ``tokens`` is their number.
        shared: further conditions, the same of both guidance branches: shapes become random tensors.
        own: conditions that differ between the branches, as shapes.
    """

    config: str
    options: dict[str, Any]
    latents: tuple[Shape, ...]
    text: int = 64
    tokens: int = 8
    shared: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Shape] = field(default_factory=dict)

    def noise(self) -> Any:
        """A tensor, or ComfyUI's nested one for several streams."""
        made = [random(shape, 4 * i) for i, shape in enumerate(self.latents)]
        if len(made) == 1:
            return made[0]
        import comfy.nested_tensor

        return comfy.nested_tensor.NestedTensor(made)

    def conds(self, branch: int) -> list[Any]:
        """Conditions of branch 1 or 2."""
        extra = {name: _drawn(value, 9) for name, value in self.shared.items()}
        extra |= {name: random(shape, 50 + branch) for name, shape in self.own.items()}
        return [[random((1, self.tokens, self.text), branch), extra]]

    def model(self, seed: int = 1) -> Any:
        """A ModelPatcher. Its text and time act as gently as a trained model's: steps are smooth."""
        import checkpoints
        import comfy.model_patcher
        import comfy.supported_models

        made = getattr(comfy.supported_models, self.config)
        config = made({**made.unet_config, **self.options})
        config.set_inference_dtype(torch.float32, None)
        config.unet_config["dtype"] = torch.float32
        model = config.get_model({}, "").eval()
        kept = model.diffusion_model.state_dict()
        for key, value in checkpoints.fill(model.diffusion_model, seed).items():
            if key.endswith("inv_freq"):  # left empty by MiniMax-H3
                kept[key].copy_(10_000.0 ** -(torch.arange(len(value)) / len(value)))
            elif "freqs" not in key and (value.ndim > 1 or "pos_embed" not in key) and kept[key].is_floating_point():
                kept[key].copy_(_gentle(key, value).to(kept[key].dtype))
        return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def _gentle(key: str, weight: Tensor) -> Tensor:
    """A matrix scaled so that the model acts like a trained one: small outputs, and no dependence on the fast waves of the time, which
    make the velocity of a random model jump from step to step."""
    if weight.ndim < 2:
        return weight
    low = f".{key.lower()}"
    if any(part in low for part in ("time", "t_embed", ".t_block", "adaln_single.emb", "tproj", "tmlp")):
        weight = 0.5 * weight
        if low.endswith(FIRST) and weight.ndim == 2:
            weight = weight * _slow(weight.shape[1])
    if low.endswith("distilled_guidance_layer.in_proj.weight"):  # Chroma: 16 numbers of time, 16 of guidance, 32 of the block
        weight = torch.cat([weight[:, :16] * _slow(16), weight[:, 16:]], 1)
    return 0.3 * weight if any(part in key for part in LAST) else weight


def _slow(width: int) -> Tensor:
    """1 for the waves of a time embedding that turn less than once over a schedule of times up to 1000, else 0: ``[width]``."""
    waves = 10_000.0 ** -(torch.arange(width // 2) / (width // 2))
    return (waves * 1000 < 6).float().repeat(2)


def random(shape: Shape, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _drawn(value: Any, seed: int) -> Any:
    if isinstance(value, list):
        return [_drawn(v, seed) for v in value]
    return random(value, seed) if isinstance(value, tuple) else value


IMAGE, VIDEO = ((1, 16, 16, 16),), ((1, 16, 3, 16, 16),)
POOLED: dict[str, Shape] = {"pooled_output": (1, 64)}
FLUX: dict[str, Any] = dict(
    image_model="flux", in_channels=16, out_channels=16, patch_size=2, vec_in_dim=64, context_in_dim=64, hidden_size=128, mlp_ratio=4.0,
    num_heads=1, depth=2, depth_single_blocks=2, axes_dim=[16, 56, 56], theta=10000, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
)  # fmt: skip
CHROMA = {name: value for name, value in FLUX.items() if name != "guidance_embed"} | dict(
    image_model="chroma", in_channels=64, out_channels=64, in_dim=64, out_dim=128, hidden_dim=128, n_layers=2, vec_in_dim=None
)
FLUX2 = FLUX | dict(
    image_model="flux2", axes_dim=[32] * 4, mlp_ratio=3.0, theta=2000, in_channels=128, out_channels=128, global_modulation=True,
    mlp_silu_act=True, qkv_bias=False, ops_bias=False, default_ref_method="index", ref_index_scale=10.0, txt_ids_dims=[3], patch_size=1,
    vec_in_dim=None,
)  # fmt: skip
QWEN = dict(image_model="qwen_image", in_channels=64, num_layers=2, attention_head_dim=128, num_attention_heads=1, joint_attention_dim=64)
LUMINA: dict[str, Any] = dict(
    image_model="lumina2", patch_size=2, in_channels=16, dim=96, cap_feat_dim=64, n_layers=2, n_heads=1, n_kv_heads=1, qk_norm=True,
    axes_dims=[32] * 3, axes_lens=[300, 512, 512], rope_theta=10000.0, ffn_dim_multiplier=4.0,
)  # fmt: skip
Z = LUMINA | dict(
    dim=256, n_heads=2, n_kv_heads=2, axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], rope_theta=256.0, z_image_modulation=True,
    time_scale=1000.0, pad_tokens_multiple=32,
)  # fmt: skip
HUNYUAN: dict[str, Any] = dict(
    image_model="hunyuan_video", in_channels=16, out_channels=16, patch_size=[1, 2, 2], vec_in_dim=768, axes_dim=[16, 56, 56],
    meanflow=False, context_in_dim=64, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=2, theta=256,
    qkv_bias=True, byt5=False, guidance_embed=True, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False,
)  # fmt: skip
LTX = dict(
    image_model="ltxv", num_layers=2, attention_head_dim=4, cross_attention_dim=128, num_attention_heads=32, caption_channels=64,
    in_channels=128,
)  # fmt: skip
LTX2 = LTX | dict(
    image_model="ltxav", audio_cross_attention_dim=64, audio_attention_head_dim=2, audio_num_attention_heads=32, audio_in_channels=128
)
UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[1, 1], channel_mult=[1, 2], num_heads=2,
    use_spatial_transformer=True, legacy=False, adm_in_channels=None, transformer_depth_output=[1] * 4, transformer_depth_middle=1,
    context_dim=64, transformer_depth=[1, 1],
)  # fmt: skip
COSMOS = dict(
    image_model="cosmos_predict2", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
    patch_temporal=1, model_channels=128, num_heads=1, num_blocks=2, concat_padding_mask=True, crossattn_emb_channels=64,
    pos_emb_cls="rope3d", pos_emb_learnable=True, pos_emb_interpolation="crop", min_fps=1, max_fps=30, use_adaln_lora=True,
    adaln_lora_dim=32, extra_per_block_abs_pos_emb=False, rope_h_extrapolation_ratio=4.0, rope_w_extrapolation_ratio=4.0,
    rope_t_extrapolation_ratio=1.0, extra_h_extrapolation_ratio=1.0, extra_w_extrapolation_ratio=1.0, extra_t_extrapolation_ratio=1.0,
    rope_enable_fps_modulation=False,
)  # fmt: skip
ACE = dict(
    audio_model="ace", attention_head_dim=64, in_channels=8, inner_dim=128, max_height=16, max_position=4096, max_width=4096, mlp_ratio=2.5,
    num_attention_heads=2, num_layers=2, out_channels=8, patch_size=[16, 1], rope_theta=1e6, speaker_embedding_dim=512,
    text_embedding_dim=64, ssl_encoder_depths=[1, 1], ssl_latent_dims=[32, 32], ssl_names=["mert", "m-hubert"],
    lyric_encoder_vocab_size=100, lyric_hidden_size=1024,
)  # fmt: skip
WAN = dict(
    image_model="wan2.1", patch_size=(1, 2, 2), in_dim=16, dim=256, ffn_dim=512, freq_dim=256, text_dim=4096, out_dim=16, num_heads=2,
    num_layers=2, window_size=(-1, -1), qk_norm=True, cross_attn_norm=True, eps=1e-6,
)  # fmt: skip
H3 = dict(
    image_model="minimax_h3", hidden_size=128, num_layers=2, token_refiner_num_layers=1, num_attention_heads=1, attention_head_dim=128,
    ffn_hidden_size=256, text_dim=64, timestep_input_dim=64, time_embed_hidden_size=128, time_embed_dim=64, rope_inv_freq_len=16,
)  # fmt: skip


def mask(tokens: int) -> Tensor:
    return torch.ones(1, tokens, dtype=torch.int)


def wan(config: str, kind: str, shared: dict[str, Any] | None = None, latents: tuple[Shape, ...] = VIDEO, **over: Any) -> Setup:
    return Setup(config, {**WAN, "model_type": kind, **over}, latents, 4096, shared=shared or {})


def flux(config: str, guidance: float | None, shared: dict[str, Any] | None = None, **over: Any) -> Setup:
    more = {} if guidance is None else {"guidance": guidance}
    return Setup(config, FLUX | over, IMAGE, shared={**more, **(shared or {})}, own=POOLED)


def images() -> dict[str, Setup]:
    omnigen = dict(
        image_model="omnigen2", axes_dim_rope=[40] * 3, axes_lens=[1024, 1664, 1664], ffn_dim_multiplier=None, hidden_size=120,
        in_channels=16, multiple_of=256, norm_eps=1e-5, num_attention_heads=1, num_kv_heads=1, num_layers=2, num_refiner_layers=1,
        out_channels=None, patch_size=2, text_feat_dim=64, timestep_scale=1000.0,
    )  # fmt: skip
    hidream = dict(
        image_model="hidream", attention_head_dim=128, axes_dims_rope=[64, 32, 32], caption_channels=[64, 64], max_resolution=[128, 128],
        in_channels=16, llama_layers=[0, 1], num_attention_heads=1, num_routed_experts=2, num_activated_experts=1, num_layers=1,
        num_single_layers=1, out_channels=16, patch_size=2, text_emb_dim=64,
    )  # fmt: skip
    aura = dict(in_channels=4, out_channels=4, dim=128, n_layers=3, n_double_layers=1, n_heads=2, global_conddim=128, cond_seq_dim=2048,
                max_seq=256)  # fmt: skip
    ernie = dict(image_model="ernie", hidden_size=128, num_attention_heads=1, num_layers=2, ffn_hidden_size=256, in_channels=128,
                 out_channels=128, patch_size=1, text_in_dim=64, rope_axes_dim=(32, 48, 48))  # fmt: skip
    lens = dict(image_model="lens", in_channels=128, out_channels=32, num_layers=2, num_attention_heads=1, enc_hidden_dim=64,
                multi_layer_encoder_feature=False, selected_layer_index=(0,))  # fmt: skip
    krea = dict(image_model="krea2", features=128, tdim=64, txtdim=64, heads=2, kvheads=2, multiplier=2, layers=2, txtlayers=1, txtheads=2,
                txtkvheads=2)  # fmt: skip
    sd3 = dict(
        input_size=None, patch_size=2, in_channels=16, depth=3, adm_in_channels=2048, qk_norm="rms", num_patches=4096,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 192}},
        pos_embed_max_size=64, pos_embed_scaling_factor=None, x_block_self_attn_layers=[0, 1],
    )  # fmt: skip
    pixart = dict(image_model="pixart_sigma", input_size=32, pe_interpolation=1, hidden_size=128, depth=2, num_heads=2, caption_channels=64,
                  micro_condition=False, model_max_length=16)  # fmt: skip
    fill = {"concat_latent_image": (1, 16, 16, 16), "concat_mask": torch.ones(1, 1, 16, 16)}
    square, four = ((1, 128, 8, 8),), ((1, 4, 16, 16),)
    return {
        "Flux.1 dev": flux("Flux", 3.5),
        "Flux.1 schnell": flux("FluxSchnell", None, guidance_embed=False),
        "Flux Kontext": flux("Flux", 2.5, {"reference_latents": [(1, 16, 16, 16)]}),
        "Flux Fill": flux("FluxInpaint", 30.0, fill, in_channels=96),
        "Chroma": Setup("Chroma", CHROMA, IMAGE),
        "Flux.2 dev": Setup("Flux2", FLUX2, square, shared={"guidance": 4.0}),
        "LongCat-Image": Setup(
            "LongCatImage", FLUX | dict(guidance_embed=False, vec_in_dim=None, context_in_dim=3584, txt_ids_dims=[1, 2]), IMAGE, 3584
        ),
        "Qwen-Image": Setup("QwenImage", QWEN, ((1, 16, 1, 16, 16),)),
        "Qwen-Image-Edit": Setup("QwenImage", QWEN, ((1, 16, 1, 16, 16),), shared={"reference_latents": [(1, 16, 1, 16, 16)]}),
        "Lumina2": Setup("Lumina2", LUMINA, IMAGE),
        "Z-Image": Setup("ZImage", Z, IMAGE),
        "HunyuanImage 2.1": Setup(
            "HunyuanImage21",
            HUNYUAN | dict(in_channels=64, out_channels=64, patch_size=[1, 1], axes_dim=[64, 64], vec_in_dim=None, guidance_embed=False),
            ((1, 64, 16, 16),),
        ),
        "HiDream-I1": Setup("HiDream", hidream, IMAGE, own=POOLED | {"conditioning_llama3": (1, 2, 8, 64)}),
        "SD3.5": Setup("SD3", sd3, IMAGE, 4096, own={"pooled_output": (1, 2048)}),
        "SD1.5": Setup("SD15", UNET | dict(use_linear_in_transformer=False), four),
        "SDXL": Setup(
            "SDXL",
            UNET | dict(model_channels=64, use_linear_in_transformer=True, adm_in_channels=2816, num_classes="sequential"),
            four,
            shared={"width": 1024, "height": 1024},
            own={"pooled_output": (1, 1280)},
        ),
        "Cosmos-Predict2": Setup("CosmosT2IPredict2", COSMOS, ((1, 16, 1, 16, 16),)),
        "Anima": Setup("Anima", COSMOS | dict(image_model="anima", crossattn_emb_channels=1024), ((1, 16, 1, 16, 16),), 1024),
        "OmniGen2": Setup("Omnigen2", omnigen, IMAGE, shared={"attention_mask": mask(8)}),
        "AuraFlow": Setup("AuraFlow", aura, four, 2048),
        "ERNIE-Image": Setup("ErnieImage", ernie, square),
        "Lens": Setup("Lens", lens, square),
        "PixArt Sigma": Setup("PixArtSigma", pixart, ((1, 4, 48, 48),)),
        "Krea 2": Setup("Krea2", krea, IMAGE),
    }


def videos() -> dict[str, Setup]:
    kandinsky = dict(image_model="kandinsky5", model_dim=64, ff_dim=128, num_text_blocks=1, num_visual_blocks=2, time_dim=32,
                     in_text_dim=64, in_text_dim2=64, visual_embed_dim=132)  # fmt: skip
    mochi = dict(
        image_model="mochi_preview", depth=2, patch_size=2, num_heads=2, hidden_size_x=128, hidden_size_y=64, mlp_ratio_x=96.0,
        mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False, out_bias=True, attn_drop=0.0,
        patch_embed_bias=True, posenc_preserve_area=True, timestep_mlp_bias=True, attend_to_padding=False, timestep_scale=1000.0,
        use_t5=True, t5_feat_dim=64, t5_token_length=16, rope_theta=10000.0,
    )  # fmt: skip
    hunyuan15 = HUNYUAN | dict(in_channels=65, out_channels=32, patch_size=[1] * 3, vec_in_dim=None, guidance_embed=False,
                               use_cond_type_embedding=True, vision_in_dim=64)  # fmt: skip
    clip: dict[str, Shape] = {"pooled_output": (1, 768)}
    ltx, frame = {"attention_mask": None, "frame_rate": 25}, (1, 16, 1, 16, 16)
    small, sound = (1, 128, 3, 8, 8), (1, 8, 12, 16)
    ltx25 = dict(cross_attention_adaln=True, ff_bias=False, audio_ff_bias=False, use_keyframes_abs_pos_embedding=True)
    given = {"concat_latent_image": VIDEO[0], "concat_mask": torch.ones(1, 1, 3, 16, 16)}
    vace = {"vace_frames": [(1, 32, 3, 16, 16)], "vace_mask": [torch.ones(1, 64, 3, 16, 16)], "vace_strength": [1.0]}
    return {
        "HunyuanVideo": Setup("HunyuanVideo", HUNYUAN, VIDEO, shared={"guidance": 6.0}, own=clip),
        "HunyuanVideo I2V": Setup(
            "HunyuanVideoI2V", HUNYUAN | {"in_channels": 33}, VIDEO, shared={"guidance": 6.0, "concat_latent_image": VIDEO[0]}, own=clip
        ),
        "HunyuanVideo 1.5": Setup("HunyuanVideo15", hunyuan15, ((1, 32, 3, 8, 8),), shared={"pooled_output": None}),
        "LTX-Video": Setup("LTXV", LTX, (small,), shared=ltx | {"attention_mask": mask(8)}),
        "LTX-2": Setup("LTXAV", LTX2, (small, sound), 128, shared=ltx),
        "LTX-2.5": Setup("LTXAV", LTX2 | ltx25, (small, sound), 128, shared=ltx),
        "MiniMax-H3": Setup("MiniMaxH3", H3, ((1, 24, 3, 8, 8), (1, 32, 2, 15))),
        "ACE-Step": Setup("ACEStep", ACE, ((1, 8, 16, 32),), shared={"conditioning_lyrics": torch.ones(1, 8, dtype=torch.long)}),
        "Kandinsky 5": Setup("Kandinsky5", kandinsky, VIDEO, own=POOLED),
        "Mochi": Setup(
            "GenmoMochi", mochi, ((1, 12, 3, 16, 16),), tokens=16, shared={"attention_mask": torch.ones(1, 16, dtype=torch.int)}
        ),
        "WAN 2.1": wan("WAN21_T2V", "t2v"),
        "WAN 2.1 I2V": wan("WAN21_I2V", "i2v", given, in_dim=36),
        "WAN Fun-Control": wan("WAN21_FunControl2V", "i2v", {"concat_latent_image": (1, 32, 3, 16, 16)}, in_dim=48),
        "WAN VACE": wan("WAN21_Vace", "vace", vace, vace_layers=1, vace_in_dim=96),
        "WAN Phantom": wan("WAN21_T2V", "t2v", {"time_dim_concat": frame}),
        "WAN Camera": wan("WAN21_Camera", "camera", {"camera_conditions": (1, 24, 3, 128, 128)}, in_dim=32),
        "WAN 2.2 S2V": wan(
            "WAN22_S2V",
            "s2v",
            {"audio_embed": (1, 25, 64, 9), "reference_latents": [frame]},
            audio_dim=64,
            audio_inject_layers=[0, 1],
            cond_dim=16,
        ),
        "WAN 2.2 Animate": wan("WAN22_Animate", "animate", {"pose_video_latent": (1, 16, 2, 16, 16)}, in_dim=36, motion_encoder_dim=64),
        "WAN HuMo": wan("WAN21_HuMo", "humo", {"reference_latents": [frame]}, in_dim=36),
        "WAN 2.2 TI2V-5B": wan("WAN22_T2V", "t2v", latents=((1, 48, 3, 8, 8),), in_dim=48, out_dim=48),
        "WAN FlowRVS": wan("WAN21_FlowRVS", "flow_rvs"),
        "WAN CausalAR": wan("WAN21_CausalAR_T2V", "t2v"),
    }


SETUPS: dict[str, Callable[[], Setup]] = {
    name: (lambda name=name, group=group: group()[name]) for group in (images, videos) for name in group()
}
