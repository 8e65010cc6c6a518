"""What users write of a packed store in the JSON of ``--kv-transfer-config``, checked before the engine starts."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ...calibrate.file import Calibration
from ...errors import TqaiError
from ...kv.bits import EXACT, by_layer
from ...kv.block import BlockCoder, BlockFormat

WIDTHS = re.compile(r"k(\d+(?:\.\d+)?)v(\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Options:
    """``path``: the folder, which engines may share. ``bits``: ``"k4v4"``, of keys and values; a fraction such as ``k4.3v4`` gives the
    layers that need it most one bit more; ``"exact"`` stores the numbers as they are. ``limit_bytes``: the folder's bound, 0 for none.
    ``sinks``: exact tokens at the start of a sequence. ``calibration``: a file of ``tqai calibrate``, for the scales of the keys.
    ``secret_file``: a file with a key of 16 to 64 bytes, for stores that others can write to. ``threads`` that pack and unpack;
    ``queue``: blocks that may wait to be packed. ``model``: a name for the weights, in place of the one found. ``heads`` and ``dim``: key
    heads of a rank and head dimension, where the model's configuration does not tell them."""

    path: str
    bits: str = "k4.3v4"
    limit_bytes: int = 0
    sinks: int = 4
    calibration: str = ""
    secret_file: str = ""
    threads: int = 2
    queue: int = 256
    model: str = ""
    heads: int = 0
    dim: int = 0

    @classmethod
    def read(cls, given: Mapping[str, Any], ignored: tuple[str, ...] = ()) -> Options:
        """TqaiError names an option that is unknown, missing, of another type or out of range. ``ignored`` are vLLM's own."""
        types = get_type_hints(cls)
        own = {name: value for name, value in given.items() if name not in ignored}
        for name, value in own.items():
            if name not in types:
                close = difflib.get_close_matches(name, types, 1)
                raise TqaiError(f"tqai has no option {name!r}{f', did you mean {close[0]!r}?' if close else ''}; it has {', '.join(types)}")
            if type(value) is not types[name]:
                raise TqaiError(f"option {name!r} is {value!r}: give {'a whole number' if types[name] is int else 'a text'}")
        for field in fields(cls):
            if field.default is MISSING and not own.get(field.name):
                raise TqaiError(f"option {field.name!r} is missing: give the folder of the packed blocks")
        made = cls(**own)
        for name, least, most in (("limit_bytes", 0, 2**60), ("sinks", 0, 64), ("threads", 1, 64), ("queue", 1, 2**20)):
            if not least <= getattr(made, name) <= most:
                raise TqaiError(f"option {name!r} is {getattr(made, name)}: give {least} to {most}")
        made.widths()
        return made

    def widths(self) -> tuple[float, float]:
        """Bits of keys and of values, on average over the layers."""
        if self.bits == "exact":
            return EXACT, EXACT
        found = WIDTHS.fullmatch(self.bits)
        if found is None:
            raise TqaiError(f"option 'bits' is {self.bits!r}: give bits of keys and values such as 'k4v4', 'k5v4', 'k4.3v4', or 'exact'")
        return float(found[1]), float(found[2])

    def secret(self) -> bytes:
        """The key of the store; empty without one."""
        if not self.secret_file:
            return b""
        try:
            with Path(self.secret_file).expanduser().open("rb") as file:
                key = file.read(65).strip()
        except OSError as error:
            raise TqaiError(f"option 'secret_file': {self.secret_file!r} cannot be read ({error.strerror})") from None
        if not 16 <= len(key) <= 64:
            told = f"option 'secret_file': {self.secret_file!r} has {len(key)} bytes, a key has 16 to 64"
            raise TqaiError(f"{told}: make one with `openssl rand -hex 32`")
        return key

    def coder(self, model: str, dtype: str, layers: int, heads: int, tokens: int, dim: int, ranks: int = 1) -> BlockCoder:
        """The coder of the blocks of one engine. ``layers`` are of one of ``ranks``, ``heads`` a rank's: ranks follow each other."""
        scale, order = self._calibrated(layers, heads * ranks, dim)
        bits_k, bits_v = (by_layer(bits, layers, order) * ranks for bits in self.widths())
        if scale is not None:
            scale = scale.unflatten(1, (ranks, heads)).transpose(0, 1).flatten(0, 1).contiguous()
        ident = "" if scale is None else hashlib.sha256(scale.numpy().tobytes()).hexdigest()[:16]
        format = BlockFormat(self.model or model, dtype, heads, tokens, dim, bits_k, bits_v, sinks=self.sinks, calibration=ident)
        return BlockCoder(format, scale, self.secret())

    def _calibrated(self, layers: int, heads: int, dim: int) -> tuple[Tensor | None, list[int] | None]:
        """Scales of the keys ``fp32 [layers, heads, dim]``, and the layers in the order in which one bit more saves most."""
        if not self.calibration:
            return None, None
        found = Calibration.load(Path(self.calibration).expanduser()).tensors
        scale, damage = found.get("scale"), found["damage"]
        if scale is None:
            raise TqaiError(f"{self.calibration}: no scales of keys in it: calibrate the language model that vLLM serves")
        if tuple(scale.shape) != (layers, heads, dim):
            theirs = f"{scale.shape[0]} layers of {scale.shape[1]} heads of {scale.shape[2]}"
            ours = f"the engine has {layers} of {heads} of {dim}"
            raise TqaiError(f"{self.calibration}: measured on {theirs}, {ours}: calibrate the model that vLLM serves")
        low = min(int(self.widths()[0]), 8)
        saved = (damage[:, :, 0, :, low - 1] - damage[:, :, 0, :, min(low, 7)]).sum((1, 2))
        return scale.to(torch.float32), saved.argsort(descending=True).tolist()
