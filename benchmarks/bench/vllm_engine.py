"""An engine of vLLM in this process, on a CPU, with a packed store: what the bench and tests/vllm share. Runs in .venv-vllm alone."""

from __future__ import annotations

import os

os.environ |= {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TOKENIZERS_PARALLELISM": "false", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip  # before vLLM is imported: one process, one thread, nothing leaves the machine

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

SIZES = {"dtype": "bfloat16", "max_model_len": 4608, "max_num_seqs": 4, "kv_cache_memory_bytes": 512 << 20, "max_num_batched_tokens": 4608}


def connector(store: str | Path, **options: Any) -> dict[str, Any]:
    """--kv-transfer-config of the KV connector."""
    return {
        "kv_connector": "TqaiConnector", "kv_connector_module_path": "tqai_core.hosts.vllm", "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {"path": str(store), **options},
    }  # fmt: skip


def tier(store: str | Path, host_bytes: int = 256 << 20, **options: Any) -> dict[str, Any]:
    """The same of vLLM's own offloading with the packed tier below; the stand-in takes its part on engines without a GPU."""
    below = {"type": "TqaiTier", "module_path": "tqai_core.hosts.vllm", "path": str(store), **options}
    extra = {"spec_name": "HostSpec", "spec_module_path": "bench.vllm_host", "cpu_bytes_to_use": host_bytes, "secondary_tiers": [below]}
    return {
        "kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra,
        "kv_load_failure_policy": "recompute",
    }  # fmt: skip


@dataclass
class Answer:
    """One request. ``hidden``: the last layer's output ``[tokens computed, width]`` of its forward calls, one after the other."""

    hidden: list[Tensor]
    cached: int  # tokens that were loaded or there
    tokens: list[int]
    seconds: float  # CPU


class Engine:
    """``model`` is a folder; ``transfer`` a dictionary of above, or None."""

    def __init__(self, model: str, transfer: dict[str, Any] | None, **sizes: Any) -> None:
        from vllm import LLM

        more = {} if transfer is None else {"kv_transfer_config": transfer}
        self.llm = LLM(model=model, enforce_eager=True, enable_prefix_caching=True, **(SIZES | sizes), **more)
        core = self.llm.llm_engine.engine_core.engine_core
        self.core = core
        self.net = core.model_executor.driver_worker.worker.model_runner.model
        self._seen: list[Tensor] = []
        forward = self.net.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            self._seen.append(out.detach().clone())
            return out

        self.net.forward = watched
        self.offloads = transfer is not None and transfer["kv_connector"] == "OffloadingConnector"

    @property
    def worker(self) -> Any:
        """The connector's half that moves blocks."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group()

    @property
    def tiers(self) -> list[Any]:
        return self.core.scheduler.connector.connector_scheduler.manager.secondary_tiers

    def drain(self) -> None:
        """Until all that was to be saved is saved."""
        if self.offloads:
            self.ask([7] * 40)  # a step, in which vLLM hands over what it has copied
            for one in self.tiers:
                one.drain_jobs()
        else:
            self.worker.drain()

    def ask(self, ids: list[int], count: int = 1, forget: bool = True) -> Answer:
        """Greedy tokens after ``ids``. ``forget``: what the engine's own cache has of earlier requests does not count."""
        return self.ask_all([ids], count, forget)[0]

    def ask_all(self, many: list[list[int]], count: int = 1, forget: bool = True) -> list[Answer]:
        """Several requests at once; ``hidden`` and ``seconds`` are of all of them."""
        from vllm import SamplingParams

        if forget and not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not forget its prefixes")
        self._seen.clear()
        start = time.process_time()
        prompts = [{"prompt_token_ids": ids} for ids in many]
        out = self.llm.generate(prompts, SamplingParams(max_tokens=count, temperature=0, ignore_eos=True), use_tqdm=False)
        spent = time.process_time() - start
        return [Answer(list(self._seen), o.num_cached_tokens or 0, list(o.outputs[0].token_ids), spent) for o in out]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


@dataclass(frozen=True)
class Judge:
    """Closeness of two runs by the logits of their hidden states."""

    embedding: Tensor

    @classmethod
    def of(cls, model: str) -> Judge:
        from safetensors import safe_open

        with safe_open(str(Path(model) / "model.safetensors"), "pt") as file:
            names = file.keys()
            return cls(file.get_tensor("lm_head.weight" if "lm_head.weight" in names else "model.embed_tokens.weight").float())

    def logits(self, hidden: Tensor) -> Tensor:
        return (hidden.float() @ self.embedding.T).log_softmax(-1)

    def compare(self, exact: Tensor, other: Tensor) -> dict[str, float]:
        """KL in nats and the share of equal best tokens, means over the positions ``[n, width]``."""
        e, x = self.logits(exact), self.logits(other)
        kl = (e.exp() * (e - x)).sum(-1)
        return {"kl": kl.mean().item(), "kl_worst": kl.max().item(), "top1": (e.argmax(-1) == x.argmax(-1)).float().mean().item()}


def say(found: dict[str, Any]) -> None:
    """To the process that started this one."""
    print("RESULT " + json.dumps(found), flush=True)
