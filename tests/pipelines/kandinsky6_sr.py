"""Kandinsky 6 super resolution: tile after tile of a video, a schedule for each; no text and no guidance."""

from diffusers import Kandinsky6SRPipeline, Kandinsky6SRTransformer3DModel
from diffusers.models.autoencoders.autoencoder_kandinsky6_sr import Kandinsky6SRVAE

from .base import euler, film, random, sample

CHUNKS = 2
TILE = 128  # pixels


def pipe():
    transformer = random(
        Kandinsky6SRTransformer3DModel, in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=32, ff_dim=64, num_visual_blocks=2,
        axes_dims=(4, 6, 6), tile_sizes=((TILE, TILE),),
    )  # fmt: skip
    widths = dict(encoder_block_out_channels=(8,) * 5, decoder_block_out_channels=(8,) * 5)
    vae = random(Kandinsky6SRVAE, latent_channels=4, layers_per_block=1, **widths)
    for weight in vae.decoder.conv_out.parameters():
        weight.mul_(4)  # else the picture is nearly grey, whatever the latents
    return Kandinsky6SRPipeline(transformer=transformer, vae=vae, scheduler=euler())


def call(pipe, steps, seed):
    tiles = [picture.resize((TILE * 3 // 4, TILE // 2)) for picture in film(1)]
    return sample(pipe, steps, seed, video=tiles, resolution_scale=2, output_type="pt")
