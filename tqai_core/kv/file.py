"""The state of a packed cache as tensors and a header, as files hold it. Names of fields are those of FORMAT 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..codecs.rows import BITS, Rows
from ..codecs.split import UNIT, Split
from ..errors import TqaiError
from ..files import check_tensor
from .cache import PackedKV
from .segments import SEGMENT, Segment
from .statistics import KeyStatistics

AGAIN = "save the cache again"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
STATISTICS = ("mean", "scale", "_q2")
LEAST = (("scale", 1e-12), ("_q2", -1e-30))  # energies may be 0
LARGEST = 1e12  # of all numbers: no model has such keys, and products of two stay within fp32


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
    if header.get("plan") != vars(kv.plan):
        raise TqaiError(f"the file was written with {header.get('plan')}, this cache is {vars(kv.plan)}: give the same config")
    if header["length"] == 0 and not {"keys", "values"} & tensors.keys():
        return
    keys = check_tensor(tensors, "keys", (None,) * 4, DTYPES, AGAIN)
    values = check_tensor(tensors, "values", (*keys.shape[:3], None), (keys.dtype,), AGAIN)
    exact = ("keys", "values") if header.get("exact_why") else ()  # a layer may be held exact because of NaN or inf
    check_range({name: tensor for name, tensor in tensors.items() if name not in exact})
    kv.start(keys, values)
    kv.keys, kv.values = keys, values
    _side(kv, tensors, tuple(header["bits_v"]))
    for kind, segments in (("segments", kv.segments), ("fine", kv.fine)):
        for i in range(header[kind]):
            segments.append(_segment(tensors, f"{kind}.{i}", kv.keys.shape[:2], *kv.coders(kind == "fine")))
    if kv.packed and (keys.shape[2] < kv.plan.sink or (kv.statistics.mean is None) != (kv.plan.calibrate == 0)):
        raise TqaiError(f"field 'mean' or the first {kv.plan.sink} keys are missing, with {kv.packed} tokens packed: {AGAIN}")
    own = {name.removeprefix("policy."): tensor for name, tensor in tensors.items() if name.startswith("policy.")}
    kv.policy.restore(own, header.get("policy") or {}, keys, kv.packed, kv.packed - sum(map(len, kv.segments)))
    kv.length, kv.exact_why = header["length"], header["exact_why"]
    if kv.packed + keys.shape[2] != kv.length:
        raise TqaiError(f"field 'length' says {kv.length}, the tensors hold {kv.packed + keys.shape[2]}: {AGAIN}")


def check_range(tensors: Mapping[str, Tensor]) -> None:
    """TqaiError names a tensor with NaN, inf, or numbers from which attention overflows."""
    for name, x in tensors.items():
        if x.is_floating_point() and x.numel() and not bool((x.abs() < LARGEST).all()):
            raise TqaiError(f"field {name!r} is damaged, it has NaN, inf or numbers beyond {LARGEST:g}: {AGAIN}")


def _side(kv: PackedKV, tensors: dict[str, Tensor], bits_v: tuple[int, ...]) -> None:
    """Statistics of the keys and axes of the values."""
    (keys, values), again = kv.exact, AGAIN
    b, h, d = keys.shape[0], keys.shape[1], keys.shape[3]
    known = {name: check_tensor(tensors, name, (b, h, 1, d), (torch.float32,), again) for name in STATISTICS if name in tensors}
    if ("mean" in known) != ("scale" in known) or any(not bool((known[name] > low).all()) for name, low in LEAST if name in known):
        raise TqaiError(f"field 'mean', 'scale' or '_q2' is missing or damaged: {again}")
    kv.statistics = KeyStatistics(*(known.get(name) for name in STATISTICS))
    if ("basis" in tensors) != (len(bits_v) == 2) or (len(bits_v) == 1 and bits_v != (kv.plan.bits_v,)):
        raise TqaiError(f"field 'basis' does not go with 'bits_v': {again}")
    if "basis" in tensors:
        basis = check_tensor(tensors, "basis", (h, None, values.shape[3]), (torch.int8,), again)
        r = basis.shape[1]
        if r % UNIT or not 0 < r <= values.shape[3] // 2 or not set(bits_v) <= set(BITS) or not bool(basis.any(-1).all()):
            raise TqaiError(f"field 'basis' {list(basis.shape)} of {list(bits_v)} bits is damaged: {again}")
        kv.basis, kv.bits_v = basis, bits_v


def _segment(tensors: dict[str, Tensor], name: str, shape: torch.Size, coder_k: Rows, coder_v: Rows | Split) -> Segment:
    """The segment of a file, checked field by field."""
    parts: list[Tensor] = []
    for part, coder in (("k", coder_k), ("v", coder_v)):
        size = parts[0].shape[2] if parts else None
        codes = check_tensor(tensors, f"{name}.codes_{part}", (*shape, size, coder.row_bytes), (torch.uint8,), AGAIN)
        runs = (2,) if isinstance(coder, Split) else ()
        gain = check_tensor(tensors, f"{name}.gain_{part}", (*shape, codes.shape[2], *runs), (torch.bfloat16,), AGAIN)
        if not 0 < codes.shape[2] <= SEGMENT:
            raise TqaiError(f"field '{name}.codes_{part}' is of {codes.shape[2]} tokens, a segment has {SEGMENT} at most: {AGAIN}")
        parts += [codes, gain]
    return Segment(*parts)
