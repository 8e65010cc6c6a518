"""Where a sampler is, told by diffusers' own schedulers and by the calls of a loop of one's own: no model runs here."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch

from tqai_core.families import FAMILIES
from tqai_core.hosts.diffusers.clock import CallClock, SchedulerClock, adds_noise, pipelines_on_the_stack
from tqai_core.hosts.diffusers.schedulers import scheduler

SD3, FLUX = FAMILIES["sd3"], FAMILIES["flux"]  # times to 1000, and to 1
X = torch.zeros(1, 4, 8, 8)
NAMES = ("euler", "unipc", "dpm++", "ab2")


def ticks(made, clock=None, steps=24, calls=1, family=SD3, first=0, **given):
    """What the clock says at each call of a run of ``steps``, ``calls`` of them an evaluation, from step ``first`` on."""
    clock = clock or SchedulerClock(SimpleNamespace(scheduler=made))
    made.set_timesteps(steps, **given)
    if first:
        made.set_begin_index(first)
    out = []
    for t in made.timesteps[first * made.order :]:
        now = (t if family is SD3 else t / 1000).expand(2)
        out += [clock.tick(now, family, None) for _ in range(calls)]
        made.step(X, t, X)
    return out


@pytest.mark.parametrize("family", [SD3, FLUX], ids=lambda family: family.name)
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_each_step_has_its_sigma_its_width_and_the_next_sigma(name, calls, family):
    made = scheduler(name, 3.0)
    found = ticks(made, calls=calls, family=family)
    sigmas = [float(s) for s in made.sigmas]
    assert sigmas[-1] == 0
    for n, tick in enumerate(found):
        i, step = n // calls, tick.step
        assert (tick.key, tick.fresh, tick.bypass) == (i, n == 0, None)
        assert (step.index, step.total, step.last) == (i, 24, i == 23)
        assert step.sigma == pytest.approx(sigmas[i], abs=1e-6)
        assert step.next == pytest.approx(sigmas[i + 1], abs=1e-6)
        assert step.width == pytest.approx((sigmas[i] - sigmas[i + 1]) * 24 / sigmas[0], rel=1e-4)
    assert sum(tick.step.width for tick in found) == pytest.approx(24 * calls, rel=1e-4)


@pytest.mark.parametrize("begin", ["told", "found by its time"])
def test_a_run_that_begins_in_the_middle_counts_its_own_steps(begin):
    """Image to image: the rest of the schedule is the run."""
    made = scheduler("euler", 3.0)
    clock = SchedulerClock(SimpleNamespace(scheduler=made))
    if begin == "told":
        found = ticks(made, clock, first=10)
    else:
        made.set_timesteps(24)
        found = []
        for t in made.timesteps[10:]:
            found.append(clock.tick(t.expand(2), SD3, None))
            made.step(X, t, X)
    sigmas = made.sigmas.tolist()
    assert [tick.key for tick in found] == list(range(10, 24))
    assert [tick.step.total for tick in found] == [14] * 14
    assert [tick.step.last for tick in found] == [False] * 13 + [True]
    assert [tick.step.sigma for tick in found] == pytest.approx(sigmas[10:24])
    assert sum(tick.step.width for tick in found) == pytest.approx(14)
    assert found[0].step.width == pytest.approx((sigmas[10] - sigmas[11]) * 14 / sigmas[10])


def test_a_schedule_that_is_set_anew_is_a_new_run():
    made = scheduler("euler")
    clock = SchedulerClock(SimpleNamespace(scheduler=made))
    for steps in (24, 8):
        found = ticks(made, clock, steps)
        assert [tick.fresh for tick in found] == [True] + [False] * (steps - 1)
        assert [tick.step.total for tick in found] == [steps] * steps
    made.set_timesteps(8)
    assert clock.tick(made.timesteps[0], SD3, None).fresh
    clock.reset()
    assert clock.tick(made.timesteps[0], SD3, None).fresh, "after an interrupt too"


@pytest.mark.parametrize(
    "made, why, sees",
    [
        (diffusers.DDIMScheduler(), "DDIMScheduler tells no sigma of a step", 20),
        (diffusers.CogVideoXDDIMScheduler(), "CogVideoXDDIMScheduler tells no sigma of a step", 20),
        (diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler has sigmas up to", 20),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction", use_karras_sigmas=True), "has sigmas up to", 20),
        (diffusers.FlowMatchHeunDiscreteScheduler(), "evaluates a step 2 times: skipping is proven for one", 20),
    ],
    ids=lambda part: type(part).__name__ if hasattr(part, "config") else "",
)
def test_what_is_no_flow_matching_schedule_is_counted_and_left_exact(made, why, sees):
    found = ticks(made, steps=20, calls=2)
    assert all(why in tick.bypass for tick in found)
    steps = [tick.step for tick in found]
    assert len({step.index for step in steps}) >= sees
    assert all(a.index == b.index == a_tick.key for a, b, a_tick in zip(steps[::2], steps[1::2], found[::2], strict=True)), (
        "two calls, one step"
    )
    assert [tick.fresh for tick in found] == [True] + [False] * (len(found) - 1)
    assert {step.total for step in steps} == {len(made.timesteps)}
    if made.order == 1:
        assert [step.last for step in steps[::2]] == [False] * 19 + [True]


def test_schedulers_that_add_noise_tell_no_next_sigma():
    """The correction after a forecast is for samplers that add up outputs alone."""
    made = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    assert {tick.step.next for tick in ticks(made)} == {None}
    noisy = [
        made, diffusers.EulerAncestralDiscreteScheduler(), diffusers.LCMScheduler(), diffusers.TCDScheduler(),
        diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    ]  # fmt: skip
    assert [adds_noise(s) for s in noisy] == [True] * len(noisy)
    assert [adds_noise(scheduler(name)) for name in NAMES] == [False] * len(NAMES)


def test_a_loop_of_ones_own_is_told_by_its_times():
    clock, family = CallClock(4), SD3
    call = lambda sigma, context=None: clock.tick(torch.full((2,), sigma * 1000), family, context)
    for _ in range(2):  # a second run starts at the largest time again
        found = [call(sigma) for sigma in (1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25)]
        assert [tick.fresh for tick in found] == [True] + [False] * 7
        assert [tick.key for tick in found] == [tick.step.index for tick in found] == [0, 0, 1, 1, 2, 2, 3, 3]
        assert [tick.step.last for tick in found] == [False] * 6 + [True] * 2
        assert [tick.step.sigma for tick in found[::2]] == pytest.approx([1, 0.75, 0.5, 0.25])
        assert {(tick.step.total, tick.bypass, tick.step.next) for tick in found} == {(4, None, None)}
    after = call(0.2)
    assert (after.fresh, after.key) == (True, 0), "more steps than were told begin a run"
    clock.reset()
    assert call(0.1).fresh


def test_a_loop_without_a_number_of_steps_stays_exact_unless_the_context_tells_it():
    clock = CallClock(None)
    tick = clock.tick(torch.tensor([900.0]), SD3, None)
    assert tick.bypass == "the last step is unknown: give apply(transformer, config, steps=N)"
    assert (tick.step.total, tick.step.last) == (None, False)
    context = SimpleNamespace(step_index=7, num_inference_steps=8)
    told = clock.tick(torch.tensor([800.0]), SD3, context)
    assert (told.key, told.step.total, told.step.last, told.bypass) == (7, 8, True, None)


def test_pipelines_on_the_stack_are_found_the_innermost_first():
    class Pipeline:
        def __init__(self, name, inner=None):
            self.scheduler, self.name, self.inner = None, name, inner

        def __call__(self):
            strength = f"of {self.name}"
            return self.inner() if self.inner else [(p.name, names["strength"]) for p, names in pipelines_on_the_stack() if strength]

        def other(self):
            return self()

    class Other:
        def __call__(self, made):
            return made.other()

    assert Other()(Pipeline("outer", Pipeline("inner"))) == [("inner", "of inner"), ("outer", "of outer")]
    assert list(pipelines_on_the_stack()) == []
