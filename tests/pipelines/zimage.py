"""Z-Image: the time is the second positional argument and is 1 - sigma; the output is a list, negated by the pipeline; one batch."""

from diffusers import ZImagePipeline, ZImageTransformer2DModel

from .base import SIZE, WIDTH, WORDS, calm, euler, no_text, random, rnd, sample, vae

FAST = True


def pipe():
    transformer = random(
        ZImageTransformer2DModel, all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    calm(transformer.t_embedder)
    transformer.x_pad_token.data.fill_(1.0)  # made by torch.empty
    transformer.cap_pad_token.data.fill_(1.0)
    return ZImagePipeline(transformer=transformer, scheduler=euler(), vae=vae(), **no_text())


def call(pipe, steps, seed):
    text = dict(prompt_embeds=[rnd(WORDS, WIDTH)], negative_prompt_embeds=[rnd(WORDS, WIDTH, seed=8)])
    return sample(pipe, steps, seed, **text, guidance_scale=3.0, **SIZE)
