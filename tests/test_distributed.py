"""Context parallelism: two processes over gloo, Ulysses. A rank that decided differently would hang in a collective."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = """
import os, sys
sys.path.append(sys.argv[2])
import torch, torch.distributed as dist
torch.set_num_threads(1)
torch.accelerator.device_count = lambda: 1  # diffusers divides by it; 0 on a CPU
from diffusers import ContextParallelConfig, FluxPipeline, FluxTransformer2DModel, FlowMatchEulerDiscreteScheduler
import tqai_core as tqai

def build():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(8, 12, 12)).eval()
    pipe = FluxPipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe

g = torch.Generator().manual_seed(1)
kw = dict(prompt_embeds=torch.randn(1, 4, 16, generator=g), pooled_prompt_embeds=torch.randn(1, 16, generator=g),
          height=128, width=128, num_inference_steps=20, output_type="latent", return_dict=False)
go = lambda pipe: pipe(**kw, generator=torch.Generator().manual_seed(0))[0]
config = tqai.Config(monitor="lyapunov:tau=0.2")
with torch.no_grad():
    alone = build()
    with tqai.apply(alone, config) as handle:
        want = go(alone); skipped = handle.report().calls_skipped
    dist.init_process_group("gloo")
    pipe = build()
    if sys.argv[1] == "before": pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    handle = tqai.apply(pipe, config)
    if sys.argv[1] == "after": pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    got = go(pipe)
    report = handle.report()
    actions = torch.tensor([d["action"] == "compute" for d in report.decisions], dtype=torch.int32)
    both = [torch.zeros_like(actions) for _ in range(2)]
    dist.all_gather(both, actions)
    assert torch.equal(*both), "the ranks decided differently"
    assert report.calls_skipped == skipped > 5, (report.calls_skipped, skipped)
    error = float((got - want).square().sum() / want.square().sum())
    assert error < 1e-4, error
    if dist.get_rank() == 0: print("agreed", skipped, error, flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter and then call terminate
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_two_ranks_decide_alike(order, root: Path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-c", WORKER, order, str(root)]
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        outs = [p.communicate(timeout=180) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert all(p.returncode == 0 for p in ranks), outs[0][1][-2000:] + outs[1][1][-2000:]
    assert outs[0][0].startswith("agreed")
