"""CogVideoX: DDIM on v-prediction, no flow: computed exactly."""

from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from .base import HEADS, SIZE, WIDTH, WORDS, no_text, prompts, random, sample

EXACT = "sigma"


def pipe():
    transformer = random(
        CogVideoXTransformer3DModel, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=WIDTH, num_layers=2, sample_width=8,
        sample_height=8, sample_frames=9, max_text_seq_length=WORDS, **HEADS,
    )  # fmt: skip
    vae = random(
        AutoencoderKLCogVideoX, down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    return CogVideoXPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **no_text())


def call(pipe, steps, seed):
    return sample(pipe, steps, seed, **prompts(), guidance_scale=3.0, num_frames=9, max_sequence_length=WORDS, **SIZE)
