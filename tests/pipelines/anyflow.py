"""AnyFlow: a flow map, which takes the time that a step goes to (``r_timestep``) beside the time that it comes from; no guidance."""

from diffusers import AnyFlowPipeline, AnyFlowTransformer3DModel, FlowMapEulerDiscreteScheduler

from . import wan
from .base import HEADS, WIDTH, random, slow


def parts(build=AnyFlowTransformer3DModel, **config):
    transformer = slow(
        random(
            build,
            in_channels=16,
            out_channels=16,
            text_dim=WIDTH,
            freq_dim=32,
            ffn_dim=64,
            num_layers=2,
            rope_max_seq_len=32,
            **HEADS,
            **config,
        )
    )
    return wan.parts() | dict(transformer=transformer, scheduler=FlowMapEulerDiscreteScheduler(shift=5.0))


def pipe():
    return AnyFlowPipeline(**parts())


def call(pipe, steps, seed):
    return wan.call(pipe, steps, seed)
