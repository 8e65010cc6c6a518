"""What one expert leaves to the next one that goes on with its latent (WAN 2.2 A14B): WAN's experts follow one velocity field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .memory import Stream
from .types import Where, nbytes


@dataclass(frozen=True)
class Legacy:
    """The streams of an expert, the state of its monitor, and the forecast steps (sigma, width) that nothing has corrected yet.
    It is not used up: each :meth:`stream` is a copy of its own."""

    streams: Mapping[Where, Stream]
    state: Mapping[str, Any]
    skipped: Sequence[tuple[float, float]] = ()

    def stream(self, where: Where, kind: Any) -> Stream | None:
        """The history of ``where``, where it is one of tensors of this ``kind``."""
        held = self.streams.get(where)
        if held is None or held.kind != kind:
            return None
        return dataclasses.replace(held, parts=dict(held.parts), shapes=dict(held.shapes), state=dict(held.state), decoded={})

    def moved(self, device: torch.device) -> Legacy:
        """The same, with its coded parts on ``device``."""
        copies = {where: s for where, held in self.streams.items() if (s := self.stream(where, held.kind))}
        for stream in copies.values():
            stream.move(device)
        return Legacy(copies, self.state, self.skipped)


class Legacies:
    """Legacies by the latent that their experts made: each lives as long as this tensor, and is found by the tensor's content."""

    def __init__(self) -> None:
        self._by_latent = WeakIdKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes that are held beside the latents."""
        return nbytes([s.tensors for _, legacy in self._by_latent.values() for s in legacy.streams.values()])

    def put(self, latent: Tensor, sigma: float, legacy: Legacy) -> None:
        self._by_latent[latent] = sigma, legacy

    def get(self, latent: Tensor, sigma: float) -> Legacy | None:
        for known, (left, legacy) in self._by_latent.items():
            alike = known.shape == latent.shape and known.dtype == latent.dtype and abs(left - sigma) < 1e-6
            if alike and (known is latent or torch.equal(known, latent.to(known.device))):
                return legacy  # type: ignore[no-any-return]
        return None
