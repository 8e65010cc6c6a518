"""LTX-2 with all its guidance: three calls a step more, without some blocks and without the other modality, each in its context."""

from . import ltx2

pipe = ltx2.pipe


def call(pipe, steps, seed):
    scales = dict(stg_scale=1.0, audio_stg_scale=1.0, modality_scale=3.0, audio_modality_scale=3.0)
    return ltx2.call(pipe, steps, seed, **scales, spatio_temporal_guidance_blocks=[1], use_cross_timestep=True)
