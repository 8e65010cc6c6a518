"""The flow on streams whose truth is known."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tqai_core as tqai
from tqai_core.flow import Flow
from tqai_core.memory import Memory, Stream
from tqai_core.metrics import nmse
from tqai_core.registry import REGISTRY, build, names
from tqai_core.report import Recorder
from tqai_core.types import Part, Step, Where

WHERE = (Where("model"),)
GRID = torch.linspace(1, 0, 25).tolist()
A, B = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))


def line(sigma: float) -> torch.Tensor:
    return A + sigma * B


def curve(sigma: float) -> torch.Tensor:
    return A + torch.sin(2 * sigma * B.abs() + 1)


def drive(config, truth=curve, steps=24, where=WHERE, bypass=None):
    """Run a generation; returns outputs, the flow and its recorder."""
    recorder = Recorder(lambda: flow.nbytes)
    flow = Flow(config, recorder)
    recorder.begin()
    flow.begin(bypass)
    out = []
    for i in range(steps):
        if flow.enter(Step(i, GRID[i], steps, i == steps - 1)).compute:
            flow.signal("entropy", torch.tensor([0.5 + GRID[i] / 100, 0.7]))
        out.append([flow.apply(w, lambda i=i: truth(GRID[i])) for w in where])
    return out, flow, recorder


@given(order=st.sampled_from(["delta", "delta2"]), dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_forecast_is_exact_on_streams_of_its_order(order, dtype, seed):
    """delta repeats a constant stream exactly, delta2 continues a straight one within rounding."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 32, generator=g)
    stream = Stream(build("codec", "exact"))
    strategy = build("strategy", order)
    value = lambda s: (a + (s * b if order == "delta2" else 0)).to(dtype)
    for i, sigma in enumerate((0.9, 0.7, 0.65)):
        stream.hold(strategy.plan(value(sigma), None, stream, Step(i, sigma)), value(sigma), Step(i, sigma))
    guess = strategy.forecast(stream, Step(5, 0.3))
    assert nmse(guess, value(0.3)) < (1e-10 if dtype == torch.float32 else 1e-3)


@given(sigmas=st.lists(st.floats(0.01, 1), min_size=3, max_size=6, unique=True), bits=st.integers(4, 8))
@settings(max_examples=40, deadline=None)
def test_the_coded_loop_is_closed(sigmas, bits):
    """What is held decodes to the value within the codec's own error, however long the history: nothing drifts."""
    sigmas = sorted(sigmas, reverse=True)
    stream, strategy = Stream(build("codec", f"turbo:bits={bits}")), build("strategy", "delta2")
    for i, sigma in enumerate(sigmas):
        x = curve(sigma)
        stream.hold(strategy.plan(x, None, stream, Step(i, sigma)), x, Step(i, sigma))
        direct = build("codec", f"turbo:bits={bits}")
        assert torch.equal(stream.value("value"), direct.decode(direct.encode(x)))
        stream.decoded.clear()


def test_a_straight_stream_is_skipped_up_to_the_largest_gap():
    out, _, recorder = drive(tqai.Config(codec="exact", monitor="lyapunov:tau=0.01,max_gap=4"), line)
    report = recorder.report
    assert report.calls == 24
    assert report.calls_skipped >= 14
    actions = "".join(d["action"][0] for d in report.decisions)
    assert actions.startswith("ccc")
    assert actions.endswith("c")
    assert max(len(run) for run in actions.split("c")) == 4, "max_gap=4: at most four forecasts in a row"
    for (x,), sigma in zip(out, GRID, strict=False):
        assert nmse(x, line(sigma)) < 1e-9


def test_a_rough_stream_is_computed():
    g = torch.Generator().manual_seed(1)
    noise = [torch.randn(4, 32, generator=g) for _ in range(24)]
    it = iter(noise)
    out, _, recorder = drive(tqai.Config(), lambda s: next(it))
    assert recorder.report.calls_skipped == 0
    assert all(torch.equal(x, n) for (x,), n in zip(out, noise, strict=True))
    with pytest.warns(UserWarning, match="nothing was skipped in 24 evaluations: its output does not change smoothly"):
        recorder.end()


def test_a_forecast_within_the_tolerance_is_not_rough_though_reuse_would_be_closer():
    """The errors of a trained Z-Image at shift 3: a run that forecast half of its steps well was given up at the fourth."""
    for errors, given_up in (((0.25, 0.027, 0.1, 0.042), False), ((0.25, 0.1, 0.1, 0.1), True)):
        monitor, state = build("monitor", "lyapunov:tau=0.06"), {"reuse": 0.001}
        for i, error in enumerate((None, None, *errors)):
            step = Step(i, 1 - i / 24, 24)
            monitor.decide(step, None, 1, state)
            monitor.observe(step, error, 1, state)
        assert bool(monitor.gives_up(state)) == given_up


def test_scorer_snr_changes_decisions():
    base = dict(codec="exact", monitor="lyapunov:tau=0.05")
    flat = drive(tqai.Config(scorer=None, **base))[2].report
    weighted = drive(tqai.Config(scorer="snr", **base))[2].report
    assert [d["action"] for d in flat.decisions] != [d["action"] for d in weighted.decisions]
    scorer = build("scorer", "snr")
    scores = [scorer.score(None, Step(0, s / 10), Stream(build("codec", "exact"))) for s in range(11)]
    assert scores == sorted(scores, reverse=True), "monotone in sigma"
    assert scores[0] == 1
    assert scores[-1] == 0


def test_order_one_beats_order_zero_at_equal_calls():
    config = lambda s: tqai.Config(strategy=s, monitor="fixed:interval=2", codec="exact")
    errors = {}
    for s in ("delta", "delta2"):
        out, _, recorder = drive(config(s))
        errors[s] = sum(nmse(x, curve(sigma)) for (x,), sigma in zip(out, GRID, strict=False))
        assert recorder.report.calls_skipped == 10
    assert errors["delta2"] < errors["delta"] / 5


@pytest.mark.parametrize("grid", [[1 - i / 24 for i in range(25)], [3 * (1 - i / 24) / (1 + 2 * (1 - i / 24)) for i in range(25)]])
@pytest.mark.parametrize("order", [0, 1])
def test_the_estimate_is_right_for_polynomials_on_any_grid(grid, order):
    """For a polynomial of degree order + 1 the remainder is exact, so every estimate must equal the true error."""
    truth = lambda s: 1.0 + s ** (order + 1)
    monitor, state, nodes, told = build("monitor", "lyapunov:tau=0"), {}, [], 0
    for i in range(12):
        step = Step(i, grid[i], 24)
        estimate = monitor.decide(step, None, order, state).error_estimate
        if i in (0, 1, 2, 5, 6, 10):
            error = None
            if len(nodes) > order:
                a = nodes[-1]
                line = truth(a) if order == 0 else truth(a) + (grid[i] - a) * (truth(a) - truth(nodes[-2])) / (a - nodes[-2])
                error = abs(line - truth(grid[i]))
                if estimate is not None:
                    told += 1
                    assert estimate == pytest.approx(error, rel=1e-9)
            monitor.observe(step, error, order, state)
            nodes.append(grid[i])
    assert told >= 3


@pytest.mark.parametrize(("sigma", "after", "total"), [(0.125, 0.083, 24), (0.08, None, None), (0.21, 0.12, 5)])
def test_near_the_end_a_forecast_must_be_surer(sigma, after, total):
    """Nothing corrects its error: the next step is below sigma .1, or the last one. The same forecast is taken a step earlier."""

    def decided(estimate, step):
        monitor, state = build("monitor", "lyapunov:tau=0.1,warmup=1"), {}
        for i, node in enumerate((0.9, 0.8, 0.7)):
            monitor.decide(Step(i, node, total), None, 0, state)
            monitor.observe(Step(i, node, total), 0.01, 0, state)
        state["error"] *= estimate / monitor.decide(step, None, 0, copy.deepcopy(state)).error_estimate
        return monitor.decide(step, None, 0, state)

    end, before = Step(3, sigma, total, next=after), Step(2, 0.3, 24, next=0.2)
    for estimate, at_the_end, earlier in ((0.03, False, False), (0.05, True, False), (0.09, True, False), (0.11, True, True)):
        assert decided(estimate, end).compute is at_the_end, estimate
        assert decided(estimate, before).compute is earlier, estimate


def gaps(config, sigmas, told=True):
    """An Euler sampler of a field that is a parabola over sigma, through a flow: how far it is from its own way without
    forecasts after each computed step, and whether that step was the model's own. ``told``: the flow knows it is Euler."""
    field = lambda s: A + s * B + s * s * A.flip(-1)
    flow = Flow(config, Recorder(lambda: 0))
    flow.recorder.begin()
    x, exact, found = torch.zeros_like(A), torch.zeros_like(A), []
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        last = i == len(sigmas) - 2
        flow.enter(Step(i, now, len(sigmas) - 1, last, 1.0, then if told else None))
        out = flow.apply(WHERE[0], lambda now=now: field(now))
        x, exact = x + (then - now) * out, exact + (then - now) * field(now)
        if flow.decision.compute:
            found.append((nmse(x, exact), torch.equal(out, field(now)), now < 0.1 or last))
    return found


@given(st.lists(st.floats(0.2, 1.0), min_size=24, max_size=24), st.sampled_from([1.5, 2.0, 3.0]))
@settings(max_examples=25, deadline=None)
def test_an_euler_sampler_takes_back_what_forecasts_of_a_parabola_lack(widths, interval):
    """On any grid. Not below sigma .1, not in the last step, and not where the sampler is another one."""
    sigmas = [1 - part / sum(widths) for part in itertools.accumulate([0.0, *widths])]
    config = lambda correct: tqai.Config(
        strategy=f"delta2:correct={correct}", monitor=f"fixed:interval={interval},min_steps=1", codec="exact"
    )
    off = gaps(config("false"), sigmas)
    assert gaps(config("true"), sigmas, told=False) == off
    assert all(own for _, own, _ in off), "a computed step is the model's own"
    assert max(error for error, _, _ in off) > 1e-8
    on = gaps(config("true"), sigmas)
    assert all(error < 1e-10 for error, _, end in on if not end)
    assert all(own for _, own, end in on if end)
    assert not all(own for _, own, _ in on)


def test_branches_never_mix():
    shift = {"cond": 0.0, "uncond": 100.0}
    where = [Where("model", b) for b in shift]
    recorder = Recorder(lambda: flow.nbytes)
    flow = Flow(tqai.Config(codec="exact"), recorder)
    recorder.begin()
    for i in range(24):
        flow.enter(Step(i, GRID[i], 24, i == 23))
        for w in where:
            x = flow.apply(w, lambda i=i, w=w: curve(GRID[i] / 8) + shift[w.branch])
            assert nmse(x - shift[w.branch], curve(GRID[i] / 8)) < 0.05
    assert recorder.report.calls == 48
    assert recorder.report.calls_skipped > 10
    assert recorder.report.evaluations == 24


def test_bytes_are_walked_and_freed():
    _, flow, recorder = drive(tqai.Config(codec="turbo:bits=8"))
    held = sum(t.numel() * t.element_size() for s in flow.memory.streams.values() for p in s.parts.values() for t in p.tensors.values())
    report = recorder.report
    assert flow.nbytes == held > 0
    assert report.bytes_held_peak == held
    assert report.bytes_exact == 2 * 2 * A.numel()
    assert held < report.bytes_exact * 0.45
    flow.end()
    assert flow.nbytes == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_makes_that_stream_exact_and_is_reported(bad):
    def truth(sigma):
        x = curve(sigma)
        return torch.full_like(x, bad) if abs(sigma - GRID[8]) < 1e-6 else x

    good, ill = Where("model", "cond"), Where("model", "uncond")
    recorder = Recorder(lambda: flow.nbytes)
    flow = Flow(tqai.Config(monitor="fixed:interval=2"), recorder)
    recorder.begin()
    seen = 0
    for i in range(24):
        flow.enter(Step(i, GRID[i], 24, i == 23))
        flow.apply(good, lambda i=i: curve(GRID[i]))
        x = flow.apply(ill, lambda i=i: truth(GRID[i]))
        seen += not bool(x.isfinite().all())
        if i > 8:
            assert torch.equal(x, curve(GRID[i])), "exact from then on"
    report = recorder.report
    assert seen == 1
    assert set(flow.memory) == {good}, "what will never be forecast is not held"
    assert {"where": "transformer/model/uncond/out", "why": "NaN or inf in its output"} in report.fallbacks
    assert report.per_site["transformer/model/cond/out"]["skipped"] >= 9, "the healthy stream goes on"


def test_nan_in_the_first_evaluation_is_found():
    truth = lambda s: torch.full((2, 32), math.nan) if s == 1.0 else curve(s)[:2, :32]
    out, _, recorder = drive(tqai.Config(), truth)
    assert recorder.report.fallbacks[0]["why"] == "NaN or inf in its output"
    assert recorder.report.calls_skipped == 0
    assert torch.equal(out[5][0], truth(GRID[5]))


@pytest.mark.parametrize(
    "kind, change",
    [("shape", lambda x: x[:3]), ("dtype", lambda x: x.bfloat16())],
)
def test_a_changed_tensor_starts_a_new_history(kind, change):
    truth = lambda s: curve(s) if s > 0.5 else change(curve(s))
    out, _, recorder = drive(tqai.Config(monitor="fixed:interval=1"), truth)
    assert recorder.report.fallbacks == [
        {"where": "transformer/model/cond/out", "why": "shape, dtype or device changed: its history starts anew"}
    ]
    assert out[20][0].shape == truth(GRID[20]).shape
    assert out[20][0].dtype == truth(GRID[20]).dtype


def test_a_late_stream_and_gradients_stay_exact():
    recorder = Recorder(lambda: flow.nbytes)
    flow = Flow(tqai.Config(monitor="fixed:interval=3"), recorder)
    recorder.begin()
    for i in range(24):
        flow.enter(Step(i, GRID[i], 24, i == 23))
        flow.apply(Where("model", "cond"), lambda i=i: curve(GRID[i]))
        if i > 4:
            assert torch.equal(flow.apply(Where("model", "late"), lambda i=i: curve(GRID[i])), curve(GRID[i]))
        x = flow.apply(Where("model", "grad"), lambda i=i: curve(GRID[i]).requires_grad_())
        assert x.requires_grad
    whys = " ".join(f["why"] for f in recorder.report.fallbacks)
    assert "appeared after the first evaluation" in whys
    assert "torch.no_grad" in whys
    assert recorder.report.per_site["transformer/model/cond/out"]["skipped"] > 5


@pytest.mark.parametrize("config", [tqai.Config(strategy=None), tqai.Config(monitor=None)])
def test_no_method_is_off(config):
    out, flow, recorder = drive(config)
    assert all(torch.equal(x, curve(s)) for (x,), s in zip(out, GRID, strict=False))
    assert flow.nbytes == recorder.report.bytes_held_peak == 0
    assert recorder.report.fallbacks[0]["why"].startswith("no ")


def test_too_few_steps_are_left_alone_with_the_reason():
    out, _, recorder = drive(tqai.Config(), steps=8)
    assert all(torch.equal(x, curve(s)) for (x,), s in zip(out, GRID, strict=False))
    with pytest.warns(UserWarning, match="8 steps are too few to forecast"):
        recorder.end()


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# every scorer x strategy x monitor in two types, and every codec x strategy x type
MATRIX = [(*m, "turbo", d) for m in itertools.product([None, *names("scorer")], names("strategy"), names("monitor")) for d in DTYPES[:2]]
MATRIX += [("change", s, "lyapunov", c, d) for s, c, d in itertools.product(names("strategy"), names("codec"), DTYPES)]


@pytest.mark.parametrize("scorer, strategy, monitor, codec, dtype", MATRIX)
def test_matrix_of_everything_registered(scorer, strategy, monitor, codec, dtype, fisher_file):
    codec = {"name": codec, "bits": 8} if "bits" in REGISTRY["codec"][codec].options() else codec
    scorer = {"name": scorer, "file": fisher_file} if scorer == "fisher" else scorer
    level = REGISTRY["strategy"][strategy].levels[0]
    config = tqai.Config(scorer=scorer, strategy=strategy, monitor=monitor, codec=codec, level=level)
    assert tqai.Config.from_json(config.to_json()) == config
    out, flow, recorder = drive(config, lambda s: curve(s / 8).to(dtype))
    report = recorder.report
    assert report.calls == 24
    assert report.calls_skipped > 0, "a gentle stream must be forecast somewhere"
    assert report.bytes_held_peak > 0
    for (x,), sigma in zip(out, GRID, strict=False):
        assert x.dtype == dtype
        assert nmse(x, curve(sigma / 8)) < 0.05
    flow.end()
    assert flow.nbytes == 0


def test_empty_and_one_token_tensors():
    for shape in ((0, 64), (1, 64), (1, 1), (2, 3, 5)):
        out, _, recorder = drive(tqai.Config(monitor="fixed:interval=2"), lambda s, shape=shape: torch.full(shape, s))
        assert out[10][0].shape == shape
        assert recorder.report.calls == 24


def test_what_is_returned_may_be_overwritten():
    """Hosts write into outputs in place; what is held must not follow."""
    config = tqai.Config(strategy="delta", monitor="fixed:interval=3", codec="exact")
    recorder = Recorder(lambda: flow.nbytes)
    flow = Flow(config, recorder)
    recorder.begin()
    x = torch.ones(2, 32)
    for i in range(24):
        flow.enter(Step(i, GRID[i], 24, i == 23))
        y = flow.apply(Where("model"), lambda: x.clone())
        assert torch.equal(y, x)
        y.zero_()


def test_the_ranks_agree_on_the_summed_error():
    """What ``agree`` returns is what the monitor sees: an error that only another rank has makes this one compute."""
    config = tqai.Config(monitor="lyapunov:tau=0.05")
    truth = lambda i: curve(GRID[i] / 8)
    skipped = []
    for other in (0.0, 1e3):
        recorder = Recorder(lambda: 0)
        flow = Flow(config, recorder, agree=lambda sums, other=other: torch.cat([sums[:1] + other, sums[1:]]))
        recorder.begin()
        for i in range(24):
            flow.enter(Step(i, GRID[i], 24, i == 23))
            flow.apply(Where("model"), lambda i=i: truth(i))
        skipped.append(recorder.report.calls_skipped)
    assert skipped[0] > 5
    assert skipped[1] == 0


def test_two_ranks_see_the_mean_of_a_signal_and_the_sum_of_the_squares():
    """``agree`` sums over the ranks: squares are parts of one tensor, an entropy is a number of each."""
    found = []
    for ranks in (1, 2):
        flow = Flow(tqai.Config(monitor="stability"), Recorder(lambda: 0), agree=lambda sums, ranks=ranks: sums * ranks)
        flow.recorder.begin()
        for i in range(6):
            flow.enter(Step(i, GRID[i], 24))
            flow.signal("entropy", torch.tensor([0.5, 0.7]))
            flow.signal("other", torch.tensor([0.25]))
            flow.signal("third", torch.tensor([2.0]))
            flow.apply(WHERE[0], lambda i=i: curve(GRID[i]))
        flow.enter(Step(6, GRID[6], 24))
        found.append(([d["error"] for d in flow.recorder.report.decisions[:6]], dict(flow.gate_state.state)))
    (errors, state), (errors_of_two, state_of_two) = found
    assert errors_of_two[1:] == pytest.approx(errors[1:])
    for name, value in {"entropy": [0.5, 0.7], "other": [0.25], "third": [2.0]}.items():
        assert state[name] == state_of_two[name] == pytest.approx(value)


def test_of_two_guidance_branches_every_second_computed_step_runs_one():
    """From the third computed step on, which is the first that knows how the difference moves; never the last step."""
    cond, uncond = Where("model", "cond"), Where("model", "uncond")
    flow = Flow(tqai.Config(strategy="delta2:cfg=difference", monitor="fixed:interval=2", codec="exact"), Recorder(lambda: 0))
    flow.recorder.begin()
    ran, computed = [], []
    for i in range(24):
        computed.append(flow.enter(Step(i, GRID[i], 24, i == 23)).compute)
        flow.apply(cond, lambda i=i: line(GRID[i]))
        x = flow.apply(uncond, lambda i=i: ran.append(i) or 0.5 * line(GRID[i]) + A, cond)
        assert nmse(x, 0.5 * line(GRID[i]) + A) < 1e-9, "straight branches have a straight difference"
        if computed[-1] and i < 23:
            assert flow.memory[uncond].step.index == i, "held as if computed"
    steps = [i for i, own in enumerate(computed) if own]
    assert ran == [i for nth, i in enumerate(steps) if nth < 2 or nth % 2 or i == 23]
    site = flow.recorder.report.per_site
    assert site["transformer/model/uncond/out"]["skipped"] == 24 - len(ran) > site["transformer/model/cond/out"]["skipped"]


def test_a_branch_that_left_is_forgotten_and_no_longer_counted():
    """Hosts whose branches come and go: one that a computed step left out is dropped, with its bytes."""
    recorder = Recorder(lambda: flow.counted)
    flow = Flow(tqai.Config(codec="exact", monitor="fixed:interval=1"), recorder, allow_new_streams=True)
    recorder.begin()
    branches = [Where("model", str(i // 6)) for i in range(24)]
    for i, where in enumerate(branches):
        flow.enter(Step(i, GRID[i], 24, i == 23))
        if i:
            assert set(flow.memory) == {branches[i - 1]}, "what the step before computed, and nothing older"
        flow.apply(where, lambda i=i: curve(GRID[i]))
        assert flow.counted == flow.nbytes
    one = 2 * 2 * A.numel()  # two values in fp16, were they held exactly
    assert recorder.report.bytes_exact == 2 * one, "the branch that comes and the one that goes"
    flow.memory.drop(branches[-2])
    flow.memory.drop(Where("model", "nobody"))
    assert flow.memory.exact == flow.memory.counted == 0


def test_a_branch_that_comes_later_is_computed_until_a_line_goes_through_it():
    recorder = Recorder(lambda: 0)
    flow = Flow(tqai.Config(codec="exact", monitor="fixed:interval=100"), recorder, allow_new_streams=True)
    recorder.begin()
    for i in range(12):
        flow.enter(Step(i, GRID[i], 24))
        branches = [Where("model", "first"), Where("model", "later")][: 1 + (i > 5)]
        if not flow.decision.compute and not all(map(flow.should_skip, branches)):
            flow.revise("a branch has no history at this step")
            assert flow.decision.compute
            assert flow.decision.why == "a branch has no history at this step"
        for where in branches:
            flow.apply(where, lambda i=i: line(GRID[i]))
    decisions = [(d["action"], d["why"]) for d in recorder.report.decisions[3:]]
    short = ("compute", "a branch has too short a history")
    forecast = ("forecast", "one in 100")
    alone = ("compute", "a branch has no history at this step")
    assert decisions == [forecast] * 3 + [alone, short] + [forecast] * 4


def test_a_bypassed_generation_says_so_at_every_step_and_after_its_end():
    out, flow, recorder = drive(tqai.Config(monitor="fixed:interval=2"), bypass="not here")
    assert all(torch.equal(x, curve(s)) for (x,), s in zip(out, GRID, strict=False))
    assert {(d["action"], d["why"], d["model"]) for d in recorder.report.decisions} == {("compute", "not here", "transformer")}
    assert recorder.report.fallbacks == [{"where": "transformer", "why": "not here"}]
    assert recorder.report.evaluations == recorder.report.calls == 24
    flow.end()
    assert flow.bypass_reason == "not here"
    assert flow.decision.compute


def test_the_end_reads_the_errors_of_the_last_step():
    _, flow, recorder = drive(tqai.Config(monitor="fixed:interval=2"))
    assert recorder.report.decisions[-1]["error"] is None
    flow.end()
    assert recorder.report.decisions[-1]["error"] > 0


def test_numbers_that_are_no_floats_stay_exact_and_hold_nothing():
    out, flow, recorder = drive(tqai.Config(monitor="fixed:interval=2"), lambda s: torch.arange(32) + int(24 * s))
    assert all(torch.equal(x, torch.arange(32) + int(24 * s)) for (x,), s in zip(out, GRID, strict=False))
    assert recorder.report.fallbacks == [{"where": "transformer/model/cond/out", "why": "its output is torch.int64, no float"}]
    assert not list(flow.memory)


def test_the_score_of_a_step_reaches_the_monitor_and_the_strategy():
    """The mean score of a computed step is its importance; a strategy that spends bits by score spends them on other tokens."""
    outs = {}
    for scorer in (None, "palm"):
        config = tqai.Config(scorer=scorer, strategy="tiered", monitor="fixed:interval=2")
        outs[scorer], flow, _ = drive(config, lambda s: curve(s / 8))
    assert not all(torch.equal(x, y) for (x,), (y,) in zip(*outs.values(), strict=True))
    assert 0 <= flow.importance <= 1


def test_streams_know_their_place_their_grid_and_where_they_lie():
    memory = Memory(build("codec", "exact"))
    memory.grid = (2, 3)
    first, cpu = memory[Where("model", "first")], torch.device("cpu")
    assert (first.where, first.grid, first.offload_device) == (Where("model", "first"), (2, 3), None)
    first.hold({"value": Part(A)}, A, Step(0, 1.0))
    memory.offload(cpu)
    assert {s.offload_device for s in (first, memory[Where("model", "second")])} == {cpu}
    assert torch.equal(first.value("value"), A)
    memory.clear()
    assert memory[Where("model", "first")].offload_device is None


@pytest.mark.parametrize("shape, vectors", [((3, 64), 3), ((2, 4, 16, 16), 16), ((1, 3000), 24), ((5, 7), 1)])
def test_rows_too_short_or_too_long_are_coded_as_vectors_of_128(shape, vectors, lloyd_max):
    """A latent's rows of 16 numbers would pay a gain each. Vectors cut from it have no mean in common."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stream = Stream(build("codec", "turbo:bits=6"))
    stream.hold({"value": Part(x)}, x, Step(0, 1.0))
    packed = stream.parts["value"]
    assert math.prod(packed.shape[:-1]) == vectors
    assert "mean" not in packed.tensors
    assert stream.value("value").shape == x.shape
    assert stream.value("value").dtype == torch.float32
    assert nmse(stream.value("value"), x) < lloyd_max[5]


def test_the_error_of_a_part_counts_relative_to_the_whole():
    """Window attention forecasts the residual alone: its error matters as far as the output feels it."""
    flow = Flow(tqai.Config(strategy="delta", codec="exact", monitor="fixed:interval=1"), Recorder(lambda: 0))
    flow.recorder.begin()
    for i in range(3):
        flow.enter(Step(i, GRID[i], 24))
        flow.observe(Where("attn.0"), (i + 1) * A, against=10 * A)
    flow.enter(Step(3, GRID[3], 24))
    assert [d["error"] for d in flow.recorder.report.decisions[1:3]] == pytest.approx([0.1, 0.1])
    assert flow.recorder.report.per_site["transformer/attn.0/cond/out"]["calls"] == 3


@pytest.mark.parametrize("rounding", [0.0, 1e-7])
def test_a_sampler_that_adds_noise_and_comes_back_to_each_sigma_is_forecast_where_no_noise_lies_between(rounding):
    """dpm_2_ancestral: from each sigma to the next one, then noise, then that sigma again. The noise of a step cannot be told, the
    evaluation after it can; no line may be drawn from before the noise to after it, and each error is that of its own kind."""
    recorder = Recorder(lambda: flow.nbytes)
    flow = Flow(tqai.Config(codec="exact", monitor="lyapunov:tau=0.05"), recorder)
    recorder.begin()
    flow.fresh_noise = 0.3
    noise = torch.randn(25, *A.shape, generator=torch.Generator().manual_seed(5))
    walk = [(0, 0)] + [(i, k) for i in range(1, 24) for k in (i - 1, i)]  # (place in the grid, noise that lies in the latent)
    errors = []
    for n, (i, k) in enumerate(walk):
        sigma = GRID[i] + (rounding if k == i else 0.0)
        flow.enter(Step(n, sigma, 24, i == 23))
        truth = A + 0.2 * sigma * B + noise[k]
        x = flow.apply(WHERE[0], lambda truth=truth: truth)
        errors.append(nmse(x, truth) ** 0.5)
    made = [d["action"] == "forecast" for d in recorder.report.decisions]
    assert sum(made) >= 0.28 * len(walk)
    assert not any(made[2::2]), "an evaluation after fresh noise was forecast"
    assert max(errors) < 0.02
    measured = [d["error"] for d in recorder.report.decisions]
    assert min(measured[6:46:2]) > 0.5, "the noise shows in the error of the evaluation after it"
    assert all(error < 0.02 for error in measured[5::2] if error is not None), "and in no other"
    assert all(d["error_estimate"] < 0.05 for d in recorder.report.decisions if d["action"] == "forecast")
    assert any("no error was measured for" in d["why"] for d in recorder.report.decisions), "the error is measured again now and then"


def two_models(jump, config=None):
    """Half of a generation by one model, the rest by another one, whose outputs lie ``jump`` away. The second one's outputs and report."""
    recorder = Recorder(lambda: sum(flow.counted for flow in flows))
    config = config or tqai.Config(codec="exact", monitor="lyapunov:tau=0.05")
    flows = [Flow(config, recorder, name) for name in ("first", "second")]
    recorder.begin()
    out = []
    for i, sigma in enumerate(GRID[:24]):
        flow = flows[i >= 12]
        if i == 12:
            legacy = flows[0].leave()
            flows[0].begin()
            flow.inherit(legacy)
        flow.enter(Step(i, sigma, 24, i == 23, next=GRID[i + 1]))
        truth = line(sigma) + (jump * A if i >= 12 else 0)
        out.append((flow.apply(WHERE[0], lambda truth=truth: truth), truth))
    recorder.end()
    return out[12:], recorder.report.decisions[12:], recorder.report


def test_a_second_model_that_goes_on_alike_takes_the_history_over():
    out, decisions, report = two_models(0.0)
    assert decisions[0]["action"] == "compute"
    assert decisions[0]["why"] == "the other expert's history fits"
    assert decisions[0]["error"] < 1e-5
    assert [d["action"] for d in decisions[1:3]] == ["forecast"] * 2
    assert all(nmse(x, truth) < 1e-9 for x, truth in out)
    assert report.bytes_held_peak >= 2 * 2 * A.numel() * 4, "while it is judged, both histories are held and counted"


@pytest.mark.parametrize("jump", [0.3, float("nan")])
def test_a_history_that_does_not_fit_is_dropped_and_changes_nothing(jump):
    out, decisions, _ = two_models(jump)
    assert [d["action"] for d in decisions[:3]] == ["compute"] * 3
    assert torch.equal(out[0][0].nan_to_num(), out[0][1].nan_to_num()), "no correction by a history that does not fit"
    if jump == jump:
        assert decisions[0]["why"] == "the other expert's history does not fit"
        assert decisions[0]["error"] > 0.1
        assert all(nmse(x, truth) < 1e-9 for x, truth in out)


@pytest.mark.parametrize(
    "config",
    [
        tqai.Config(monitor="fixed:interval=2"),  # measures nothing to judge by
        tqai.Config(strategy="delta2:cfg=difference"),
        tqai.Config(monitor="lyapunov:tau=0"),
    ],
)
def test_no_history_is_taken_over_where_nothing_judges_it(config):
    _, decisions, _ = two_models(0.0, config=config)
    assert not any("fits" in d["why"] for d in decisions)
    assert [d["action"] for d in decisions[:2]] == ["compute"] * 2


def test_noise_of_a_sampler_is_what_lies_outside_of_its_latents_and_outputs():
    """Any solver of any order, also one that steps from a single branch of guidance, against one that adds a tenth of noise."""
    from tqai_core.sampler_noise import LEAST, NoiseMeter

    def share(noise: float, guided_alone: bool) -> float:
        g = torch.Generator().manual_seed(3)
        draw = lambda: torch.randn(1, 4, 32, 32, generator=g)
        meter, x, found = NoiseMeter(), draw(), 0.0
        for _ in range(5):
            found = meter.latent(x)
            cond, uncond = draw(), draw()
            guided = uncond + 3 * (cond - uncond)
            for output in (guided,) if guided_alone else (cond, uncond, guided):
                meter.output(output)
            x = 0.7 * x + 0.2 * guided + 0.1 * uncond + noise * draw()
        return found

    assert share(0.0, guided_alone=False) < LEAST / 10
    assert share(0.1, guided_alone=False) > LEAST
    assert share(0.0, guided_alone=True) > LEAST, "what a CFG++ sampler steps from must be told"
