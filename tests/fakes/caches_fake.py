"""The caches of newer ComfyUI: two small models that keep keys and values, and the nodes' objects that hold them.

``Klein`` reads reference tokens through the two patches of FluxKVCache (0.27 and later). ``QwenImage21`` keeps its prompt in a
``PoseBranchCache`` with the interface that it has since 0.34. The prompt stands for the references: a model is smooth in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

HEADS, DIM = 2, 128


class PoseBranchCache:
    def __init__(self, store_device: Any = None, dtype: str = "default") -> None:
        self.store_device, self.dtype = torch.device(store_device or "cpu"), dtype
        self.slots: list[dict[str, Any]] = []
        self.slot: dict[str, Any] | None = None

    def select(self, k: Tensor, create: bool = True) -> bool | None:
        for slot in self.slots:
            if slot["key"].shape == k.shape and torch.equal(slot["key"], k):
                self.slot = slot
                return True
        self.slot = {"key": k.clone(), "blocks": {}, "pinned": []} if create else None
        self.slots += [self.slot] if self.slot is not None else []
        return None if create else False

    def free(self) -> None:
        self.slots, self.slot = [], None

    def filled(self, num_blocks: int) -> bool:
        return self.slot is not None and len(self.slot["blocks"]) == num_blocks

    def put(self, i: int, t: Tensor) -> None:
        assert self.slot is not None
        self.slot["blocks"][i] = t.clone()

    def prefetch(self, i: int, device: Any, dtype: Any) -> None:
        pass

    def take(self, i: int, device: Any, dtype: Any, batch_size: int) -> Tensor:
        assert self.slot is not None
        return self.slot["blocks"][i].to(device, dtype)

    def memory_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for slot in self.slots for t in slot["blocks"].values())


class KV_Attn_Input:
    def __init__(self) -> None:
        self.cache: Any = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: dict[str, Any], **kwargs: Any) -> dict[str, Tensor]:
        count = sum(extra_options.get("reference_image_num_tokens", []))
        if not count:
            return {}
        key = f"{extra_options['block_type']}_{extra_options['block_index']}"
        if key in self.cache:
            kk, vv = (x if x.shape[0] == k.shape[0] else x[:1].expand(k.shape[0], -1, -1, -1) for x in self.cache[key])
            return {"q": q, "k": torch.cat((k, kk), 2), "v": torch.cat((v, vv), 2)}
        self.cache[key] = k[:, :, -count:].clone(), v[:, :, -count:].clone()
        return {"q": q, "k": k, "v": v}

    def cleanup(self) -> None:
        self.cache = {}


def flux_kv_cache(model: Any) -> Any:
    """The node FluxKVCache."""
    clone, patch = model.clone(), KV_Attn_Input()

    def trim(inputs: dict[str, Any]) -> dict[str, Any]:
        count = sum(inputs["transformer_options"].get("reference_image_num_tokens", []))
        if len(patch.cache) > 0 and count:
            inputs["img"] = inputs["img"][:, :-count]
        return inputs

    patches = clone.model_options["transformer_options"].setdefault("patches", {})
    for name, own in (("attn1_patch", patch), ("post_input", trim)):
        patches[name] = [*patches.get(name, []), own]
    return clone


def qwen_image21_cache(model: Any, dtype: str = "default") -> Any:
    """The node QwenImage21Cache."""
    clone = model.clone()
    clone.model_options["transformer_options"]["qwen_image21_cache"] = {"device": "cpu", "dtype": dtype}
    return clone


class Attention(nn.Module):
    """One block: to its own tokens and to those that are given."""

    def __init__(self, g: torch.Generator) -> None:
        super().__init__()
        self.qkv, self.out = (nn.Parameter(torch.randn(DIM, n, generator=g) / DIM**0.5, requires_grad=False) for n in (3 * DIM, DIM))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """``q, k, v [B, heads, n, d]``"""
        return tuple(part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (x @ self.qkv).chunk(3, -1))

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + 0.3 * torch.tanh(y @ self.out)


class Edit(nn.Module):
    """What both models share: tokens of the picture, of the prompt, and of the time."""

    def __init__(self, channels: int, depth: int, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.picture, self.text, self.last = (
            nn.Parameter(torch.randn(*size, generator=g) / size[0] ** 0.5, requires_grad=False)
            for size in ((channels, DIM), (8, DIM), (DIM, channels))
        )
        self.double_blocks = nn.ModuleList(Attention(g) for _ in range(depth))

    def tokens(self, x: Tensor, t: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(2).transpose(1, 2) @ self.picture + t.view(-1, 1, 1), context @ self.text

    def result(self, h: Tensor, x: Tensor) -> Tensor:
        return (h[:, : x[0, 0].numel()] @ self.last).transpose(1, 2).reshape(x.shape)


class Klein(Edit):
    def forward(self, x: Tensor, t: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        options, patches = dict(transformer_options), transformer_options.get("patches", {})
        picture, references = self.tokens(x, t, context)
        options |= {"reference_image_num_tokens": [references.shape[1]], "block_type": "double"}
        h = torch.cat([picture, references], 1)
        for p in patches.get("post_input", []):
            h = p({"img": h, "transformer_options": options})["img"]
        for i, block in enumerate(self.double_blocks):
            q, k, v = block.heads(h)
            for p in patches.get("attn1_patch", []):
                out = p(q, k, v, pe=None, attn_mask=None, extra_options={**options, "block_index": i})
                q, k, v = out.get("q", q), out.get("k", k), out.get("v", v)
            h = block(h, q, k, v)
        return self.result(h, x)


class QwenImage21(Edit):
    prefix_cache: PoseBranchCache | None = None
    prefix_cache_enabled = False

    def reset_prefix_cache(self, enabled: bool) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.free()
        self.prefix_cache, self.prefix_cache_enabled = None, enabled

    def select_prefix_cache(self, key: Tensor, cache_bytes: int, device: Any, options: dict[str, Any]) -> tuple[Any, bool]:
        if options.get("device") == "off":
            return None, False
        if self.prefix_cache is not None and self.prefix_cache.select(key, create=False):
            return self.prefix_cache, self.prefix_cache.filled(len(self.double_blocks))
        if self.prefix_cache is None:
            self.prefix_cache = PoseBranchCache(options.get("device"), options.get("dtype", "default"))
        self.prefix_cache.select(key)
        return self.prefix_cache, False

    def forward(self, x: Tensor, t: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        h, prefix = self.tokens(x, t, context)
        cache, cached, patches = None, False, transformer_options.get("patches", {})
        hooked = transformer_options.get("patches_replace", {}).get("dit") or patches.get("post_input") or patches.get("attn1_patch")
        if self.prefix_cache_enabled and not hooked:
            key = context.flatten(1)
            cache, cached = self.select_prefix_cache(key, 0, x.device, transformer_options.get("qwen_image21_cache", {}))
        for i, block in enumerate(self.double_blocks):
            if not cached:
                q, k, v = block.heads(prefix)
                if cache is not None:
                    cache.put(i, torch.stack([k.transpose(1, 2), v.transpose(1, 2)], 1))
                prefix = block(prefix, q, k, v)
            if cache is not None:
                k, v = (part.transpose(1, 2) for part in cache.take(i, x.device, x.dtype, x.shape[0]).unbind(1))
                cache.prefetch(i + 1, x.device, x.dtype)
            q, own_k, own_v = block.heads(h)
            h = block(h, q, torch.cat([k, own_k], 2), torch.cat([v, own_v], 2))
        return self.result(h, x)


MODELS = {"klein": (Klein, 16, 1.0), "qwen21": (QwenImage21, 16, 1.0)}
