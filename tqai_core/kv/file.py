"""The state of a packed cache as tensors and a header, as files hold it. Names of fields are those of FORMAT 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..codecs.rows import Rows
from ..codecs.split import Split
from ..errors import TqaiError
from .cache import PackedKV
from .segments import Segment
from .statistics import KeyStatistics

AGAIN = "save the cache again"


def state(kv: PackedKV) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a file; :func:`restore` reads them back."""
    kv.settle()
    s = kv.statistics
    named = {"keys": kv.keys, "values": kv.values, "mean": s.mean, "scale": s.scale, "basis": kv.basis, "_q2": s.query_energy}
    tensors = {name: tensor for name, tensor in named.items() if tensor is not None}
    for kind, segments in (("segments", kv.segments), ("fine", kv.fine)):
        for i, segment in enumerate(segments):
            tensors |= {f"{kind}.{i}.{name}": tensor for name, tensor in vars(segment).items()}
    own, policy = kv.policy.state()
    header = {
        "length": kv.length, "segments": len(kv.segments), "fine": len(kv.fine), "exact_why": kv.exact_why,
        "plan": vars(kv.plan), "bits_v": list(kv.bits_v),
    }  # fmt: skip
    return tensors | {f"policy.{name}": tensor for name, tensor in own.items()}, header | ({"policy": policy} if policy else {})


def restore(kv: PackedKV, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Fill ``kv`` with what :func:`state` gave, checked field by field; TqaiError names what does not fit."""
    kv.clear()
    if header["plan"] != vars(kv.plan):
        raise TqaiError(f"the file was written with {header['plan']}, this cache is {vars(kv.plan)}: give the same config")
    kv.basis, kv.bits_v = tensors.get("basis"), tuple(header["bits_v"])
    kv.statistics = KeyStatistics(tensors.get("mean"), tensors.get("scale"), tensors.get("_q2"))
    if (kv.basis is None) != (len(kv.bits_v) == 1):
        raise TqaiError(f"field 'basis' does not go with 'bits_v': {AGAIN}")
    if "keys" not in tensors or "values" not in tensors:
        if header["length"]:
            raise TqaiError(f"field 'keys' or 'values' is missing: {AGAIN}")
        return
    kv.start(tensors["keys"], tensors["values"])
    kv.keys, kv.values = tensors["keys"], tensors["values"]
    for kind, segments in (("segments", kv.segments), ("fine", kv.fine)):
        for i in range(header[kind]):
            segments.append(_segment(tensors, f"{kind}.{i}", kv.keys.shape[:2], *kv.coders(kind == "fine")))
    own = {name.removeprefix("policy."): tensor for name, tensor in tensors.items() if name.startswith("policy.")}
    kv.policy.restore(own, header.get("policy", {}), len(kv.keys), kv.packed, kv.packed - sum(map(len, kv.segments)))
    kv.length, kv.exact_why = header["length"], header["exact_why"]
    if kv.packed + kv.keys.shape[2] != kv.length:
        raise TqaiError(f"field 'length' says {kv.length}, the tensors hold {kv.packed + kv.keys.shape[2]}: {AGAIN}")


def _segment(tensors: dict[str, Tensor], name: str, shape: torch.Size, coder_k: Rows, coder_v: Rows | Split) -> Segment:
    """The segment of a file, checked field by field."""
    parts = []
    for part, coder in (("codes_k", coder_k), ("gain_k", coder_k), ("codes_v", coder_v), ("gain_v", coder_v)):
        tensor = tensors.get(f"{name}.{part}")
        if tensor is None:
            raise TqaiError(f"field '{name}.{part}' is missing: {AGAIN}")
        dtype, last = (torch.uint8, coder.row_bytes) if part.startswith("codes") else (torch.bfloat16, tensor.shape[-1])
        if tensor.dtype != dtype or tensor.shape[:2] != shape or tensor.shape[-1] != last:
            raise TqaiError(f"field '{name}.{part}' is {tensor.dtype} {tuple(tensor.shape)}: {AGAIN}")
        parts.append(tensor)
    return Segment(*parts)
