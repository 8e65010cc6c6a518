"""The hook of one transformer: it knows step, sigma, branch and expert of each call, and asks the flow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
from torch import Tensor, nn

from ...config import Config
from ...families.base import Family
from ...flow import Flow
from ...handle import Handle
from ...inputs import Inputs
from ...types import Where
from .clock import EXPERTS, CallClock, Clock, SchedulerClock, pipelines_on_the_stack
from .sites import ModuleSite
from .token_order import TokenOrder

PASSING = ("timestep", "return_dict")  # arguments that say nothing of the history
CONTROL = ("cond_scale", "control_image")  # names in the pipelines with a ControlNet: its strength at the step, its picture
TEXT = ("encoder_hidden_states", "encoder_hidden_states_image", "attention_kwargs")  # arguments that hold the text


@dataclass(frozen=True)
class Patch:
    """What was set on one transformer.

    Attributes:
        sites: the wrapped modules.
        protected: names of the modules that stay exact.
        whole: at level model, whether all blocks are protected.
        token_order: lays the tokens out once a call, if the strategy asks for it.
    """

    flow: Flow
    family: Family
    config: Config
    handle: Handle
    clock: Clock
    sites: list[ModuleSite]
    protected: set[str]
    whole: bool
    token_order: TokenOrder | None


class NoState(BaseState):
    """diffusers keeps a state for each cache context; tqai needs the context alone."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


def _conditions(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the history depends on. The residuals of a ControlNet are made anew at each call, and are zeros from ``control_guidance_end``
    on: what the running pipeline makes them of tells more."""
    given = {name: value for name, value in kwargs.items() if name not in PASSING}
    if any("controlnet" in name and value is not None for name, value in given.items()):
        names = next((names for pipe, names in pipelines_on_the_stack() if hasattr(pipe, "controlnet")), {})
        given |= {name: names[name] for name in CONTROL if name in names}
    return given


class RootHook(ModelHook):
    _is_stateful = True

    def __init__(self, patch: Patch) -> None:
        super().__init__()
        self.patch, self.flow, self.recorder = patch, patch.flow, patch.handle.recorder
        self.context = StateManager(NoState)  # diffusers puts the cache context here
        self.found: SchedulerClock | None = None  # of the pipeline that calls a bare transformer
        self._restart()

    def _restart(self) -> None:
        self.key: Any = None
        self.branches: Counter[str] = Counter()
        self.sibling: str | None = None  # the branch that ran before in this step
        self.output: Any = None  # class of the transformer's output
        self.inputs = Inputs(moving=("hidden_states",))
        self._forget_text()

    def _forget_text(self) -> None:
        self.texts: dict[str, Any] = {}
        for site in self.patch.sites:
            site.text.clear()

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by the pipeline when a generation is over."""
        self.context.reset()
        self._finish()
        self.recorder.end()
        return module

    def _finish(self) -> None:
        self.flow.end()
        for site in self.patch.sites:
            site.disarm()
        self._restart()
        self.patch.clock.reset()
        self.found = None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._call(module, self.fn_ref.original_forward, args, kwargs)
        except BaseException:  # also KeyboardInterrupt: a broken run leaves nothing behind
            self._finish()
            raise

    def _call(self, module: nn.Module, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flow = self.flow
        if "timestep" not in kwargs:
            self.recorder.fallback(flow.model, "timestep was not given by keyword, so the step is unknown")
            return compute(*args, **kwargs)
        context = self.context._context
        self._enter(module, context, kwargs)
        name = getattr(context, "name", None) or "call"
        self.branches[name] += 1
        nth = self.branches[name]
        branch = name if nth == 1 and context is not None else f"{name}{nth - 1}"
        sibling, self.sibling = self.sibling, branch
        if flow.bypass_reason is None and (why := self.inputs.change(branch, _conditions(kwargs))):
            flow.restart(why)
        if self.patch.config.level != "model":
            return self._armed(branch, sibling, compute, args, kwargs)
        outputs: list[Any] = []

        def run() -> Tensor:
            outputs.append(self._armed(branch, sibling, compute, args, kwargs))
            return outputs[0][0]

        if context is None and flow.guidance.on and getattr(getattr(self.patch.clock, "pipe", None), "do_classifier_free_guidance", False):
            x = self._halves(run, compute, args, kwargs)
        else:
            x = flow.apply(Where("model", branch), run, Where("model", sibling) if sibling else None)
        if outputs:
            self.output = type(outputs[0])
            if x is outputs[0][0]:
                return outputs[0]
        if not kwargs.get("return_dict", True) or self.output is None or issubclass(self.output, tuple):
            return (x,)
        return self.output(sample=x)

    def _enter(self, module: nn.Module, context: Any, kwargs: dict[str, Any]) -> None:
        """Begin a generation or a step where this call is the first one of it."""
        flow, patch = self.flow, self.patch
        tick = self._clock(module).tick(kwargs["timestep"], patch.family, context)
        if tick.fresh:
            self.recorder.end()
            self.recorder.begin()
            self._warn()
        if self.key is not None and not tick.fresh and tick.key == self.key:
            return
        if self.key is None or tick.fresh:
            for other in patch.handle.flows:  # the other expert's memory is of no more use
                other.begin()
            flow.begin(tick.bypass or ("all blocks are in skip_layers" if patch.whole else None))
            flow.memory.grid = patch.family.grid(module, kwargs)
            self.inputs.clear()
            self._forget_text()
        self.key, self.branches, self.sibling = tick.key, Counter(), None
        flow.enter(tick.step)

    def _clock(self, module: nn.Module) -> Clock:
        """The patch's clock, or that of the pipeline that calls a bare transformer."""
        clock = self.patch.clock
        if not isinstance(clock, CallClock) or clock.steps is not None:
            return clock
        pipes = (p for p, _ in pipelines_on_the_stack() if any(getattr(p, name, None) is module for name in EXPERTS))
        pipe = next(pipes, None)
        if pipe is None:
            return clock
        if self.found is None or self.found.pipe is not pipe:
            self.found = SchedulerClock(pipe)
        return self.found

    def _halves(self, run: Callable[[], Tensor], compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """SD3 runs [uncond; cond] as one batch: two streams, and half a batch where the difference is forecast."""
        flow, uncond, cond = self.flow, Where("model", "uncond"), Where("model", "cond")
        if flow.should_skip(uncond) and flow.should_skip(cond):
            return torch.cat([flow.forecast(uncond), flow.forecast(cond)])
        if flow.guidance.ready(uncond):
            size = len(kwargs["hidden_states"])
            half = {k: v[size // 2 :] if isinstance(v, Tensor) and v.ndim and len(v) == size else v for k, v in kwargs.items()}
            x = compute(*args, **{**half, "return_dict": False})[0]
            flow.observe(cond, x)
            if flow.should_predict_from_sibling(uncond, cond):
                return torch.cat([flow.predict_from_sibling(uncond, cond), x])
        x = run()
        below, above = x.chunk(2)
        flow.observe(cond, above)
        flow.observe(uncond, below, cond)
        return x

    def _armed(self, branch: str, sibling: str | None, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own forward, with its sites set for this call."""
        sites, order = self.patch.sites, self.patch.token_order
        if not sites or self.flow.bypass_reason is not None:  # the modules are as disarm left them: exact
            return compute(*args, **kwargs)
        same_text = self._same_text(branch, kwargs)
        if order is not None:
            kwargs = order.enter(kwargs)
        for site in sites:
            site.arm(branch, sibling, same_text)
        try:
            return compute(*args, **kwargs)
        finally:
            if order is not None:
                order.leave()
            for site in sites:
                site.disarm()

    def _same_text(self, branch: str, kwargs: dict[str, Any]) -> bool:
        """Whether the call has the very text tensors of the last one of its branch."""
        now = [kwargs.get(key) for key in TEXT]
        now += [getattr(x, "_version", 0) for x in now]
        last, self.texts[branch] = self.texts.get(branch), now
        return last is not None and all(a is b or (isinstance(a, int) and a == b) for a, b in zip(last, now, strict=True))

    def _warn(self) -> None:
        """Once a generation: what the user would otherwise not notice."""
        flow, patch = self.flow, self.patch
        if flow.guidance.on and patch.config.level != "model" and patch.family.name == "sd3":
            self.recorder.fallback(flow.model, "cfg=difference: SD3 runs both branches as one batch, which level 'model' alone splits")
        if patch.protected and patch.config.level == "model" and not patch.whole:
            self.recorder.warn(
                f"skip_layers {sorted(patch.protected)} changes nothing at level 'model', where a step is skipped whole: "
                "protect steps by a smaller tau, take level 'block' or 'attention', or give all blocks to switch off"
            )
        processors = [(s.name, s.module.processor) for s in patch.sites if hasattr(s.module, "processor")]
        foreign = [name for name, processor in processors if not type(processor).__name__.startswith("Tqai")]
        if foreign:
            self.recorder.warn(
                f"{len(foreign)} attention processors are not tqai's ({foreign[0]} ...): something replaced them, as "
                "fuse_qkv_projections and load_ip_adapter do; call these before tqai, and set_attn_processor after attn_processors"
            )
