"""No compression: the tensor itself, for comparison and where a cache is small anyway."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import TqaiError
from ..files import check_tensor
from ..roles import CacheCodec
from ..types import AGAIN, Packed


@dataclass(frozen=True)
class Exact(CacheCodec, name="exact"):
    """Keeps a copy in the tensor's own dtype. Error 0, 16 bits a coordinate for bf16 and fp16."""

    def encode(self, x: Tensor) -> Packed:
        return Packed(self.spec, tuple(x.shape), {"x": x.detach().clone()})

    def verify(self, packed: Packed) -> None:
        if packed.tensors.keys() != {"x"}:
            raise TqaiError(f"an exact tensor has the field 'x' alone, this has {', '.join(packed.tensors)[:200]}: {AGAIN}")
        check_tensor(packed.tensors, "x", packed.shape, (packed.tensors["x"].dtype,), AGAIN)

    def decode(self, packed: Packed, dtype: Any = None) -> Tensor:
        x = packed.tensors["x"]
        return x.to(dtype) if dtype is not None else x
