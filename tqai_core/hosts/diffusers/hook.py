"""The hook of one transformer: it knows step, sigma, branch and expert of each call, and asks the flow."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from diffusers.hooks.hooks import BaseState, ModelHook, StateManager
from torch import Tensor, nn

from ...config import Config
from ...families import TIMES
from ...families.base import Family
from ...flow import Flow
from ...handle import Handle
from ...inputs import Inputs
from ...types import Step, Where
from .clock import EXPERTS, CallClock, Clock, SchedulerClock, denoisers, pipelines_on_the_stack
from .half_size import HalfSizeCall
from .outputs import Form
from .release import on_failure
from .sites import ModuleSite
from .token_order import TokenOrder

PASSING = (*TIMES, "return_dict")  # arguments that say nothing of the history
LATENTS = ("hidden_states", "audio_hidden_states")  # another tensor at each call by their nature, as is the first argument
MOST_CALLS = 16  # of a branch in one step: a pipeline that steps its scheduler makes fewer
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

    def __init__(self, patch: Patch, model: nn.Module) -> None:
        super().__init__()
        self.patch, self.flow, self.recorder = patch, patch.flow, patch.handle.recorder
        self.context = StateManager(NoState)  # diffusers puts the cache context here
        self.names = tuple(inspect.signature(model.forward).parameters)  # of the positional arguments
        self.compiled = False
        self.half_size = HalfSizeCall(model, patch.flow.half_size, self._refused)
        self.found: SchedulerClock | None = None  # of the pipeline that calls a bare transformer
        self._restart()

    def _restart(self) -> None:
        self.key: Any = None
        self.calls = 0  # of the step before
        self.audio_step: Step | None = None
        self.branches: Counter[str] = Counter()
        self.sibling: str | None = None  # the branch that ran before in this step
        self.forms: dict[str, tuple[Form, list[Where]]] = {}  # of each branch: its output's form and streams
        self.inputs = Inputs(moving=(*LATENTS, self.names[0]))
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
        return self._eager(module, torch.compiler.is_compiling(), args, kwargs)

    @torch.compiler.disable
    def _eager(self, module: nn.Module, compiled: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``compiled``: the model was compiled as a whole. In a graph that was cut by our decisions fewer steps would be forecast."""
        self.compiled = compiled
        try:
            return self._call(module, self.fn_ref.original_forward, args, kwargs)
        except BaseException:  # also KeyboardInterrupt: a broken run leaves nothing behind
            self._finish()
            raise

    def _call(self, module: nn.Module, compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flow = self.flow
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        context = self.context._context
        if not self._enter(module, context, given):
            return compute(*args, **kwargs)
        if flow.half_size.small(cast(Step, flow.step).sigma):
            compute = self._at_half_size(compute, given)
        try:
            return self._at_step(context, given, compute, args, kwargs)
        finally:
            if flow.step is not None and flow.step.last and sum(self.branches.values()) >= self.calls:
                self._release()

    def _at_half_size(self, compute: Callable[..., Any], given: dict[str, Any]) -> Callable[..., Any]:
        """The model's forward at half the height and width, or as it is where its arguments do not allow that."""
        sigma = cast(Step, self.flow.step).sigma
        layout = self.half_size.prepare(given, sigma)
        if isinstance(layout, str):
            self.flow.half_size.off()
            self._refused(layout)
            return compute

        def half(*args: Any, **kwargs: Any) -> Any:
            self.recorder.report.calls_half += not self.flow.half_size.judges(sigma)
            return self.half_size(layout, compute, {**dict(zip(self.names, args, strict=False)), **kwargs}, sigma)

        return half

    def _refused(self, why: str) -> None:
        self.recorder.fallback(self.flow.model, f"full size: {why}")

    def _release(self) -> None:
        """Nobody asks again after the last step. Modular pipelines and loops of one's own do not say that they are over."""
        self.flow.settle()
        self.flow.memory.clear()
        self.forms.clear()
        self._forget_text()

    def _at_step(
        self, context: Any, given: dict[str, Any], compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        flow = self.flow
        name = getattr(context, "name", None) or "call"
        if context is None and self.patch.family.by_scheduler:  # what kind of call it is
            name += "".join(f" {key}={v}" for key, v in kwargs.items() if isinstance(v, (bool, str)) and v and key != "return_dict")
        self.branches[name] += 1
        nth = self.branches[name]
        if nth > MOST_CALLS and flow.bypass_reason is None:
            flow.bypass(f"the pipeline calls its model {nth} times without a step of its scheduler")
        branch = name if nth == 1 and context is not None else f"{name}{nth - 1}"
        sibling, self.sibling = self.sibling, branch
        if flow.bypass_reason is None and (why := self.inputs.change(branch, _conditions(given))):
            flow.restart(why)
        run = lambda: self._armed(branch, sibling, compute, args, kwargs)  # noqa: E731
        if self.patch.config.level != "model":
            return run()
        if context is None and flow.guidance.on and self._in_one_batch():
            return self._halves(run, compute, args, kwargs)
        return self._whole(branch, sibling, run)

    def _in_one_batch(self) -> bool:
        """Whether this call holds both branches of guidance."""
        return self.patch.family.one_batch and bool(getattr(getattr(self.patch.clock, "pipe", None), "do_classifier_free_guidance", False))

    def _whole(self, branch: str, sibling: str | None, run: Callable[[], Any]) -> Any:
        """The output of one branch: every tensor of it is a stream, and all of them are forecast or none is."""
        flow = self.flow
        form, streams = self.forms.get(branch, (None, []))
        if form is not None and streams and all(flow.should_skip(where) for where in streams):
            return form.filled([flow.forecast(where, called=i == 0, step=self._step_of(i)) for i, where in enumerate(streams)])
        before = self.forms.get(sibling or "", (None, []))[1]
        pairs = list(zip(streams, before, strict=False)) if len(streams) == len(before) else []
        if form is not None and pairs and all(flow.should_predict_from_sibling(*pair) for pair in pairs):
            return form.filled([flow.predict_from_sibling(*pair, called=pair is pairs[0]) for pair in pairs])
        output = run()
        if flow.bypass_reason is not None:  # idle: the output is not even taken apart
            self.recorder.call(flow.model, Where("model", branch), skipped=False)
            return output
        form, tensors = Form.of(output)
        streams = [Where("model", branch, f"out{i}" if i else "out") for i in range(len(tensors))]
        self.forms[branch] = form, streams
        if not flow.allow_new_streams or flow.decision.compute:  # else a step that is forecast elsewhere: no history begins here
            corrections = [
                None if self._step_of(i) else flow.correction(where, x) for i, (where, x) in enumerate(zip(streams, tensors, strict=True))
            ]
            for i, (where, x) in enumerate(zip(streams, tensors, strict=True)):
                flow.observe(where, x, before[i] if i < len(before) else None, called=i == 0, step=self._step_of(i))
            if any(where in flow.exact for where in streams):
                flow.exact.update(streams)
            if any(correction is not None for correction in corrections):
                return form.filled([x if c is None else x + c for x, c in zip(tensors, corrections, strict=True)])
        return output

    def _step_of(self, i: int) -> Step | None:
        """The step of the i-th tensor, where it has a schedule of its own: it is not corrected, since its steps have other widths."""
        return self.audio_step if i else None

    def _enter(self, module: nn.Module, context: Any, given: dict[str, Any]) -> bool:
        """Begin a generation or a step where this call is the first one of it. False for a call outside of the denoising loop."""
        flow, patch = self.flow, self.patch
        time = next((given[name] for name in TIMES if name in given), None)
        tick = self._clock(module).tick(time, patch.family, context)
        if tick is None:
            return False
        if tick.fresh:
            self.recorder.end()
            self.recorder.begin()
            self._warn()
        if self.key is not None and not tick.fresh and tick.key == self.key:
            return True
        if self.key is None or tick.fresh:
            experts = [other for other in patch.handle.flows if other.model in EXPERTS and flow.model in EXPERTS and other is not flow]
            legacy = None if tick.fresh else next(filter(None, (other.leave() for other in experts)), None)
            for other in patch.handle.flows if tick.fresh else experts:  # the other expert's memory is of no more use
                other.begin()
            flow.begin(tick.bypass or ("all blocks are in skip_layers" if patch.whole else None))
            flow.inherit(legacy)
            on_failure(self._finish)
            flow.memory.grid = patch.family.grid(module, given)
            self.inputs.clear()
            self.half_size.begin()
            self._forget_text()
        self.calls, self.key, self.branches, self.sibling = sum(self.branches.values()), tick.key, Counter(), None
        flow.enter(tick.step)
        self.audio_step = None if tick.audio_sigma is None else replace(tick.step, sigma=tick.audio_sigma)
        return True

    def _clock(self, module: nn.Module) -> Clock:
        """The patch's clock, or that of the pipeline that calls a bare transformer."""
        clock = self.patch.clock
        if not isinstance(clock, CallClock) or clock.steps is not None:
            return clock
        pipes = (p for p, _ in pipelines_on_the_stack() if any(model is module for model in denoisers(p).values()))
        pipe = next(pipes, None)
        if pipe is None:
            return clock
        if self.found is None or self.found.pipe is not pipe:
            self.found = SchedulerClock(pipe)
        return self.found

    def _halves(self, run: Callable[[], Any], compute: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """SD3 runs [uncond; cond] as one batch: two streams, and half a batch where the difference is forecast."""
        flow, uncond, cond = self.flow, Where("model", "uncond"), Where("model", "cond")
        if flow.should_skip(uncond) and flow.should_skip(cond):
            return self.forms["halves"][0].filled([torch.cat([flow.forecast(uncond), flow.forecast(cond)])])
        if flow.guidance.ready(uncond):
            size = len(kwargs["hidden_states"])
            half = {k: v[size // 2 :] if isinstance(v, Tensor) and v.ndim and len(v) == size else v for k, v in kwargs.items()}
            x = compute(*args, **{**half, "return_dict": False})[0]
            flow.observe(cond, x)
            if flow.should_predict_from_sibling(uncond, cond):
                return self.forms["halves"][0].filled([torch.cat([flow.predict_from_sibling(uncond, cond), x])])
        output = run()
        form, (x, *_) = Form.of(output)
        self.forms["halves"] = form, [uncond, cond]
        below, above = x.chunk(2)
        flow.observe(cond, above)
        flow.observe(uncond, below, cond)
        return output

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
        if self.compiled:
            self.recorder.warn(
                "the transformer was compiled as a whole after tqai was applied, and runs uncompiled now, since steps are decided outside "
                "of a graph: compile its blocks instead (transformer.compile_repeated_blocks())"
            )
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
