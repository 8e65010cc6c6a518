"""AnyFlow FAR: chunk after chunk, a schedule for each; a call before each chunk fills a cache of keys and values."""

from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel

from . import anyflow, wan

CHUNKS = 3


def pipe():
    chunks = dict(full_chunk_limit=3, compressed_patch_size=(1, 4, 4), chunk_partition=(1, 1, 1))
    return AnyFlowFARPipeline(**anyflow.parts(AnyFlowFARTransformer3DModel, **chunks))


def call(pipe, steps, seed):
    return wan.call(pipe, steps, seed)
