"""A tiny random model of each causal LM class of transformers: the sizes of its default configuration made small."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, VOCAB = 4, 96
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "n_embed"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "d_kv", "global_head_dim", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 32),
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "qk_head_dim": 32, "vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 16, "sliding_window": 16, "num_kv_shared_layers": 2, "laurel_rank": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8, "layer_types": None, "mlp_layer_types": None,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "embedding_size": 64, "word_embed_proj_dim": 64,
    "first_k_dense_replace": 1, "attention_dropout": 0.0,
}  # fmt: skip
ROPE, MIXED = {"rope_type": "default", "rope_theta": 10000.0}, {"layer_types": ["linear_attention", "full_attention"] * 2}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
# what the sizes above do not say of a class
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"layer_types": ["full_attention"] * LAYERS, "rope_parameters": {"full_attention": ROPE}},
    "cwm": {"bos_token_id": 1, "eos_token_id": [95]},
    "modernbert-decoder": {"bos_token_id": 1, "eos_token_id": 95, "cls_token_id": 1, "sep_token_id": 2},
    "dots1": {"n_shared_experts": 1}, "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16,
                   "n_groups": 1, "ssm_state_size": 16},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
                       "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "zamba": {"attn_layer_period": 2, "attn_layer_offset": 0},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3], "mamba_headdim": 16,
               "n_mamba_heads": 8, "attention_head_dim": 32, "attention_hidden_size": 128},
    "gemma3": {"vision_config": VISION}, "git": {"vision_config": VISION}, "bailing_hybrid": MIXED, "kimi_linear": MIXED,
    "emu3_text_model": {"bos_token_id": 1, "eos_token_id": 95},
    "xmod": {"default_language": "en_XX"}, "dots3_note_text": {"per_layer_config": None, "head_dim": 32},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_global_key_value_heads": 2},
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_global_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1}, "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 64},
    "gptj": {"rotary_dim": 8}, "codegen": {"rotary_dim": 8}, "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_d_ssm": 128},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16,
                         "layer_types": ["mamba", "attention", "mamba", "attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "gpt_neo": {"attention_types": [[["global"], LAYERS]]},
    "deepseek_v2": {"topk_method": "greedy"}, "persimmon": {"num_key_value_heads": None}, "phi": {"num_key_value_heads": 4},
}  # fmt: skip
# their vision, audio or byte parts stay large, whatever the text part is
TOO_LARGE = ("got_ocr2", "moss_transcribe_diarize", "phi4_multimodal", "blt", "mllama")
KINDS = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
CONFIGS = {config.model_type: (config, kind) for config, kind in MODEL_FOR_CAUSAL_LM_MAPPING.items()}


def shrunk(kind: str) -> Any:
    """The small configuration of a model type."""
    default = AutoConfig.for_model(kind)
    parts = {name: part for name in getattr(default, "sub_configs", {}) if (part := getattr(default, name, None)) is not None}
    if "text_config" in parts:  # a model of several parts, of which the text alone is asked
        own = {name: shrunk(part.model_type) for name, part in parts.items() if name == "text_config" or part.model_type in CONFIGS}
        own |= {name: None for name in ("vision_config", "audio_config") if name in parts and kind.startswith("gemma4")}
        return type(default)(**own | OWN.get(kind, {}))
    names = set(default.to_dict()) | set(vars(default))
    names |= set(getattr(default, "attribute_map", {}))
    fixed = {name for name in SIZES if isinstance(own := getattr(type(default), name, None), property) and own.fset is None}
    sizes = {name: value for name, value in SIZES.items() if name in names - fixed}
    for name in (
        "num_attention_heads",
        "decoder_attention_heads",
        "n_head",
        "n_heads",
    ):  # heads of their own where there are no fewer of keys
        if name in names and vars(default).get("num_key_value_heads") == vars(default).get(name, 0):
            sizes["num_key_value_heads"] = 4
    for name in ("sliding_window", "q_lora_rank", "layer_types", "mlp_layer_types"):  # of models that have them
        if vars(default).get(name) is None:
            sizes.pop(name, None)
    return type(default)(**sizes | OWN.get(kind, {}))


def build(kind: str) -> Any:
    """A model of the type, with weights in which tokens differ; raises what the library raises where it cannot be made."""
    torch.manual_seed(0)
    if kind in TOO_LARGE:
        raise ValueError("parts of it stay large: no tiny one can be made")
    default = AutoConfig.for_model(kind)
    text = default.get_text_config()  # of some models of several parts the class is that of the text alone
    config = shrunk(text.model_type if text is not default and isinstance(text, CONFIGS[kind][1].config_class) else kind)
    model = CONFIGS[kind][1](config).eval().requires_grad_(False)
    if sum(p.numel() for p in model.parameters()) > 30_000_000:
        raise ValueError("no small one could be made")
    for name, p in model.named_parameters():
        if p.ndim > 1 and "norm" not in name:
            p.data = torch.randn_like(p) * (2.0 / p.shape[-1] ** 0.5)
    return model
