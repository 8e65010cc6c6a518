"""Backends of packed attention: ``takes`` and ``run`` get ``(call, tier, change)``, see :mod:`attention.call` and :mod:`kv.segments`;
``run`` gives the softmax over the rows of the tier, or None where it failed."""

from __future__ import annotations

from .. import eager
from . import Backend, native, triton_packed

PACKED = (
    Backend("native", native.takes, native.run),
    Backend("triton", triton_packed.takes, triton_packed.run),
    Backend("torch", lambda call, tier, change: "", eager.run),
)
