"""Per-head KLT bases from samples of vectors, each with a verdict on vectors that it was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tqai_core.calibrate.basis import vector_errors
from tqai_core.codecs.bases import Bases, BasesFile, Basis, hadamard, klt
from tqai_core.errors import TqaiError
from tqai_core.modelhash import model_hash
from tqai_core.registry import build


def calibrate(
    samples: Mapping[str, Tensor], bits: int, codec: Any = None, held_out: float = 0.25, model: nn.Module | None = None
) -> tuple[BasesFile, dict[str, list[dict[str, Any]]]]:
    """Bases for every stream of ``samples`` (name -> ``[heads, n, d]``) with a held-out verdict a head.

    The last ``held_out`` share of the vectors judges: a head whose KLT does not beat the random rotation there, coded by
    ``codec`` at the same bytes, keeps the rotation. ``model`` is whose samples they are: its hash goes into the file.
    Returns the file and, a stream, one verdict a head.
    """
    codec = codec or build("codec", {"name": "trellis", "bits": bits})
    if codec.bits != bits:
        raise TqaiError(f"the codec has {codec.bits} bits, the bases are for {bits}: give both the same")
    streams: dict[str, tuple[Basis | None, ...]] = {}
    verdicts: dict[str, list[dict[str, Any]]] = {}
    for name, x in samples.items():
        if x.ndim != 3 or not x.is_floating_point():
            raise TqaiError(f"samples of {name!r} have shape {tuple(x.shape)}: give floats [heads, n, d]")
        cut = int(x.shape[1] * (1 - held_out))
        d = x.shape[-1]
        chosen: list[Basis | None] = []
        verdicts[name] = []
        for head in x:
            fit, test = head[:cut].float(), head[cut:].float()
            verdict: dict[str, Any] = {"vectors": cut}
            basis = None
            if cut >= 2 * d and len(test):
                basis = klt(fit, bits)
                error = {
                    kind: float(vector_errors(codec, test, bases).mean())
                    for kind, bases in (("klt", Bases((basis,))), ("hadamard", hadamard(d, bits, codec.seed)))
                }
                verdict |= error
                if error["klt"] >= error["hadamard"]:
                    basis = None
            else:
                verdict["why"] = f"{cut} vectors are fewer than 2 d = {2 * d}"
            verdict["kept"] = "hadamard" if basis is None else "klt"
            verdicts[name].append(verdict)
            chosen.append(basis)
        streams[name] = tuple(chosen)
    return BasesFile(streams, bits, "" if model is None else model_hash(model)), verdicts
