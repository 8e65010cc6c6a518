"""Sana WM's refiner: chunk after chunk, a schedule for each; calls before the first and after each chunk fill a cache of keys and
values, and their output is thrown away."""

import numpy as np
import torch
from diffusers import SanaWMLTX2Refiner, SanaWMLTX2RefinerTransformer3DModel
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from . import ltx2
from .base import WIDTH, euler, random, rnd, slow, tensors
from .base_text import LETTERS, tokenizer

CHUNKS = 2
LAYERS = 2  # of the text encoder; the connectors read them all and the embeddings


def pipe(**over):
    transformer = slow(random(SanaWMLTX2RefinerTransformer3DModel, **(ltx2.TRANSFORMER | over)))
    config = Gemma3TextConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        vocab_size=LETTERS,
    )  # fmt: skip
    parts = dict(transformer=transformer, connectors=ltx2.connectors(LAYERS + 1), scheduler=euler(shift=1.0), vae=ltx2.video_vae())
    text = dict(text_encoder=random(Gemma3ForCausalLM, config=config), tokenizer=tokenizer(), text_max_sequence_length=8)
    return SanaWMLTX2Refiner(**parts, **text)


def call(pipe, steps, seed):
    pipe.set_progress_bar_config(disable=True)
    sigmas = (*np.linspace(0.9, 0.1, steps), 0.0)
    draft, generator = rnd(1, 4, 5, 4, 4), torch.Generator().manual_seed(seed)
    chunks = dict(block_size=2, kv_max_frames=4, sigmas=sigmas, output_type="latent")
    with torch.no_grad():
        return tensors(pipe(draft, "a lake", fps=16.0, generator=generator, **chunks))
