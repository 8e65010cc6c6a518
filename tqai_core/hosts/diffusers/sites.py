"""The blocks and attentions of a diffusers transformer as sites of the flow.

What a module does in a call is told by plain attributes that the root hook sets before the blocks run (``_tqai_mode``), and the
flow is reached through two opaque ops that take the site's number as a tensor: so compiled blocks need one graph for each mode
and no graph break.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...flow import Flow
from ...site import NO_WINDOW, Site

EXACT, FORECAST, OBSERVE = 0, 1, 2  # the module's own; from the flow; its own, shown to the flow
KINDS = ("out", "out1", "out2")  # of the tensors that a module returns
SITES: WeakValueDictionary[int, ModuleSite] = WeakValueDictionary()


class ModuleSite(Site):
    """One wrapped module.

    Args:
        module: a block or an attention.
        caches: its tensors are held and forecast.
        probes: its attention entropy is measured.
        protected: it stays exact.
    """

    def __init__(self, flow: Flow, name: str, module: Any, *, caches: bool, probes: bool, protected: bool, text_first: bool):
        super().__init__(flow, name, text_first=text_first)
        self.module, self.caches, self.probes, self.protected = module, caches, probes, protected
        self.probing = self.from_sibling = False
        self.text: dict[str, Any] = {}  # keys and values of the text of each branch, of cross-attention alone
        number = len(SITES)
        while number in SITES:
            number += 1
        SITES[number] = self
        module._tqai_mode, module._tqai_slot = EXACT, torch.tensor(number)

    def arm(self, branch: str, sibling: str | None, same_text: bool) -> None:
        """Set what the module does in the coming call of ``branch``; ``sibling`` is the branch that ran before it in this step,
        ``same_text`` says that the branch has the text of its last call."""
        flow, self.branches, self.sibling, self.from_sibling = self.flow, (branch,), sibling, False
        self.probing = self.probes and sibling is None
        mode = OBSERVE
        if self.protected or flow.bypass_reason is not None:
            mode = EXACT
        elif self.caches and (kinds := self.known(("residual",) if self.in_attention else KINDS)):
            if all(self.should_skip(kind) for kind in kinds):
                mode = FORECAST
            elif sibling and not self.in_attention and all(self.should_predict_from_sibling(kind) for kind in kinds):
                mode, self.from_sibling = FORECAST, True
        self.module._tqai_mode = mode
        if self.name.startswith("cross."):
            self.module._tqai_text = self.text.get(branch) if same_text else None
            self.module._tqai_keeps_text = mode == OBSERVE

    def disarm(self) -> None:
        """The call is over: the module is exact, and new keys and values of the text are held."""
        self.module._tqai_mode = EXACT
        text = vars(self.module).get("_tqai_text")
        if text is None:
            return
        (branch,), self.module._tqai_text = self.branches, None
        if self.text.get(branch) is not text:
            self.text[branch] = text
            where, memory = self.where("text", branch), self.flow.memory
            memory[where].state["kv"] = text
            self.flow.recorder.held(self.flow.model, where, memory.count(where, 0), memory.exact)

    def observe_forecast(self, nth: int, x: Tensor) -> None:
        """The module computed its ``nth`` tensor."""
        if self.caches and not self.in_attention:
            self.observe(KINDS[nth], x)

    def output(self, nth: int) -> Tensor:
        """The ``nth`` tensor of a module that is not run."""
        return self.predict_from_sibling(KINDS[nth]) if self.from_sibling else self.forecast(KINDS[nth])

    def attention(self, q: Tensor, k: Tensor, v: Tensor, masked: bool, full: Callable[[], Tensor], fast: Callable[[], Tensor]) -> Tensor:
        """Attention of ``q, k, v [b, h, n, d]`` in a module that is run. ``full`` is the host's own, ``fast`` within its rounding."""
        if self.probing:
            self.measure(q, k)
        if not (self.caches and self.in_attention):
            return full()
        if masked or q.shape[-2] != k.shape[-2]:
            self.flow.recorder.fallback(f"{self.flow.model}/{self.name}", NO_WINDOW)
            return full()
        return self.attend(q, k, v, fast)


@torch.library.custom_op("tqai::observe", mutates_args=("slot",))
def _observe(x: Tensor, slot: Tensor, nth: int) -> None:
    SITES[int(slot)].observe_forecast(nth, x)


@torch.library.custom_op("tqai::forecast", mutates_args=())
def _forecast(like: Tensor, slot: Tensor, nth: int) -> Tensor:
    return SITES[int(slot)].output(nth)


@_forecast.register_fake
def _(like: Tensor, slot: Tensor, nth: int) -> Tensor:
    return torch.empty_like(like)


def site_of(module: Any) -> ModuleSite:
    return SITES[int(module._tqai_slot)]


def show(module: Any, nth: int, x: Tensor) -> None:
    """Show the ``nth`` tensor of ``module`` to the flow; also in compiled code."""
    if torch.compiler.is_compiling():
        _observe(x, module._tqai_slot, nth)
    else:
        site_of(module).observe_forecast(nth, x)


def ask(module: Any, nth: int, like: Tensor) -> Tensor:
    """The ``nth`` tensor of ``module`` from the flow, in the shape of ``like``; also in compiled code."""
    if torch.compiler.is_compiling():
        return _forecast(like, module._tqai_slot, nth)
    return site_of(module).output(nth)
