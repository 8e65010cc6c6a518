"""Every scorer, strategy and monitor does what its name says, on data where the answer is known."""

from __future__ import annotations

import pytest
import torch

import tqai_core as tqai
from tqai_core.flow import Flow
from tqai_core.memory import Stream
from tqai_core.metrics import nmse
from tqai_core.registry import build, names
from tqai_core.report import Recorder
from tqai_core.scorers import bsa
from tqai_core.types import Step, Where, nbytes

G = torch.Generator().manual_seed(0)


def rnd(*size):
    return torch.randn(*size, generator=G)


def stream(codec="turbo:bits=8", grid=(), site="model"):
    return Stream(build("codec", codec), Where(site), grid)


def scored(scorer, tensors, grid=()):
    where, out = stream(grid=grid), []
    for i, x in enumerate(tensors):
        out.append(scorer.score(x, Step(i, 1 - i / 10), where))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["palm", "change", "sheaf", "bsa"])
def test_scores_are_importance_in_0_1_of_every_token(name, dtype):
    for shape in ((2, 48, 64), (1, 1, 8), (2, 48, 3)):
        for score in scored(build("scorer", name), [rnd(*shape).to(dtype).transpose(0, 1).contiguous().transpose(0, 1) for _ in range(4)]):
            assert score.shape == shape[:2]
            assert bool((score >= 0).all() and (score <= 1).all())


@pytest.mark.parametrize("name", ["palm", "change"])
def test_a_novel_token_scores_higher_than_a_repeated_one(name):
    base = rnd(1, 16, 64)
    tensors = [base + 0.01 * rnd(1, 16, 64) for _ in range(5)]
    tensors[-1][:, 3] = rnd(1, 64)
    last = scored(build("scorer", name), tensors)[-1][0]
    assert int(last.argmax()) == 3
    assert last[3] > 1.5 * last[torch.arange(16) != 3].max()


@pytest.mark.parametrize("name", ["palm", "change"])
def test_the_sketch_is_small(name):
    x, where = rnd(2, 64, 1024), stream()
    build("scorer", name).score(x, Step(0, 1.0), where)
    assert nbytes(where.state) <= x.numel() * 4 / 50


@pytest.mark.parametrize("grid", [(64,), (8, 8), (4, 4, 4)])
def test_sheaf_constant_field_0_checkerboard_1(grid):
    scorer = build("scorer", "sheaf")
    (flat,) = scored(scorer, [torch.ones(1, 64, 8) * rnd(1, 1, 8)], grid)
    axes = torch.meshgrid(*[torch.arange(s) for s in grid], indexing="ij")
    sign = 1 - 2 * (sum(axes) % 2).flatten().float()
    (board,) = scored(scorer, [sign[None, :, None] * rnd(1, 1, 8)], grid)
    assert flat.abs().max() < 1e-6
    assert (board - 1).abs().max() < 1e-5


def test_sheaf_reads_the_grid():
    stripes = (1 - 2 * (torch.arange(64) // 8 % 2).float())[None, :, None] * rnd(1, 1, 8)  # rows alternate on 8 x 8
    (line,), (square,) = (scored(build("scorer", "sheaf"), [stripes], grid) for grid in ((64,), (8, 8)))
    assert square.mean() > 2 * line.mean()


def test_bsa_finds_the_planted_block():
    scorer = build("scorer", "bsa:block=8")
    q, k = rnd(1, 2, 64, 32), rnd(1, 2, 64, 32)
    direction = torch.nn.functional.normalize(rnd(32), dim=0)
    q += 3 * direction
    k[:, :, 24:32] += 6 * direction  # block 3
    mass = scorer.mass(q, k)
    assert torch.allclose(mass.sum(-1), torch.ones(()))
    assert bool((mass.argmax(-1) == 3).all())
    x = rnd(1, 64, 32) * 0.3
    x[:, 40:48] += 2 * direction
    x[:, ::2] += direction
    assert int(scored(scorer, [x])[0][0].argmax()) // 8 == 5


def test_bsa_estimates_the_true_mass():
    scorer, (q, k) = build("scorer", "bsa:block=8"), (rnd(1, 1, 8, 32).repeat_interleave(8, 2) + 0.3 * rnd(1, 1, 64, 32) for _ in range(2))
    true = (q @ k.mT * 32**-0.5).softmax(-1).unflatten(-1, (8, 8)).sum(-1).unflatten(-2, (8, 8)).mean(-2).flatten()
    ranks = [t.flatten().argsort().argsort().float() for t in (true, scorer.mass(q, k))]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.9


def test_bsa_sees_a_key_that_its_block_hides():
    """Two strong keys of opposite sign: their block's mean says nothing."""
    q, k = rnd(1, 1, 64, 32) * 0.1, rnd(1, 1, 64, 32) * 0.1
    q[..., 0] += 5
    k[:, :, 40, 0], k[:, :, 41, 0] = 9, -9
    assert bool((build("scorer", "bsa:block=8").mass(q, k).argmax(-1) == 5).all())


@pytest.mark.parametrize("room", [1, 1 << 22])
@pytest.mark.parametrize("n, m, bq, bk", [(64, 64, 16, 8), (61, 40, 16, 7), (5, 9, 16, 4), (30, 30, 3, 3), (7, 7, 1, 1)])
def test_bsa_of_any_size_is_its_definition(n, m, bq, bk, room, monkeypatch):
    monkeypatch.setattr(bsa, "ROOM", room)
    q, k = rnd(2, 3, n, 16), rnd(2, 3, m, 16)
    got = build("scorer", "bsa").mass(q, k, bq, bk)
    part = -(-bq // bsa.PARTS)
    want = []
    for block in q.split(bq, 2):
        rows = [
            (torch.einsum("bhd,bhmd->bhm", own.mean(2), k) / 4).softmax(-1) * own.shape[2] / block.shape[2] for own in block.split(part, 2)
        ]
        want.append(torch.stack([keys.sum(-1) for keys in sum(rows).split(bk, -1)], -1))
    assert torch.allclose(got, torch.stack(want, 2), atol=1e-5)
    half = build("scorer", "bsa").mass(q.bfloat16(), k.bfloat16(), bq, bk)
    assert half.dtype == torch.float32
    assert torch.allclose(half, got, atol=0.05)


def test_fisher_planted_head_ranks_first_and_time_counts(fisher_file):
    scorer = build("scorer", f"fisher:file={fisher_file}")
    assert scorer.heads(1, 0.5).argmax() // 2 == 1
    layer = [scorer.score(rnd(1, 4, 8), Step(0, 0.1), stream(site=f"attn.{i}")) for i in range(3)]
    assert layer[1] == max(layer) == 1
    assert scorer.score(None, Step(0, 0.1), stream()) > 3 * scorer.score(None, Step(0, 1.0), stream())


def test_fisher_without_a_table_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="tqai calibrate"):
        tqai.Config(scorer="fisher")
    with pytest.raises(ValueError, match="tqai calibrate"):
        build("scorer", f"fisher:file={tmp_path / 'none'}").score(None, Step(0, 1.0), stream())
    (tmp_path / "bad").write_bytes(b"no table")
    with pytest.raises(ValueError, match="damaged"):
        build("scorer", f"fisher:file={tmp_path / 'bad'}").score(None, Step(0, 1.0), stream())


def test_tiered_gives_the_bits_to_the_scored_tokens():
    x, score = rnd(2, 40, 64), torch.zeros(2, 40)
    score[0, :10], score[1, 30:] = 1.0, 1.0
    where, strategy = stream(), build("strategy", "tiered:share=0.25,high=8,low=2")
    where.hold(strategy.plan(x, score, where, Step(0, 1.0)), x, Step(0, 1.0))
    y = strategy.forecast(where, Step(1, 0.9))
    assert nmse(y[0, :10], x[0, :10]) < 1e-3 < 0.05 < nmse(y[0, 10:], x[0, 10:])
    assert nmse(y[1, 30:], x[1, 30:]) < 1e-3 < 0.05 < nmse(y[1, :30], x[1, :30])


@pytest.mark.parametrize("shape", [(2, 40, 64), (2, 3, 8, 8), (1, 2, 3, 4, 4), (1, 1, 8)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_tiered_puts_tokens_back_in_their_place(shape, share):
    where, strategy = stream("exact"), build("strategy", {"name": "tiered", "share": share})
    for i, sigma in enumerate((1.0, 0.9, 0.8)):
        x = rnd(*shape)
        where.hold(strategy.plan(x, None, where, Step(i, sigma)), x, Step(i, sigma))
        where.decoded.clear()
        assert torch.equal(strategy.forecast(where, Step(i, sigma)), x)


def monitored(monitor, signals, grid=None):
    """Decisions of a monitor that sees entropy (and no errors)."""
    state, out = {}, []
    grid = grid or [1 - i / 24 for i in range(len(signals))]
    for i, signal in enumerate(signals):
        step = Step(i, grid[i], len(signals), i == len(signals) - 1)
        decision = monitor.decide(step, None, 1, state)
        out.append(decision)
        if decision.compute:
            state["entropy"] = list(signal)
            monitor.observe(step, None, 1, state)
    return out


def test_stability_skips_while_entropy_stands_still_and_computes_while_it_moves():
    monitor = build("monitor", "stability:tau=0.02")
    calm = monitored(monitor, [(0.8, 0.5)] * 24)
    wild = monitored(monitor, [(0.8, 0.5 + 0.05 * (-1) ** i) for i in range(24)])
    assert sum(not d.compute for d in calm) >= 14
    assert sum(not d.compute for d in wild) <= 2


def test_stability_entropy_collapse_forces_a_refresh():
    monitor = build("monitor", "stability:tau=1,collapse=0.2,alpha=1")
    signals = [(0.8, 0.5)] * 10 + [(0.8, 0.1)] * 14
    after = monitored(monitor, signals)
    assert [d.why for d in after].count("a head's entropy collapsed") == 2
    assert all("collapsed" not in d.why for d in monitored(monitor, [(0.8, 0.5)] * 24))


def watched(monitor, order, sigmas, errors):
    """The decisions of a sampler that evaluates these sigmas and computes all of them, its forecasts having had these errors."""
    state, out = {}, []
    for i, (sigma, error) in enumerate(zip(sigmas, errors, strict=True)):
        out.append(monitor.decide(Step(i, sigma, 24), None, order, state))
        monitor.observe(Step(i, sigma, 24), error, order, state)
    return out


TWICE = [s for i in range(6) for s in (1 - i / 24,) * 2][1:]  # as Heun evaluates: the first sigma once, each other one twice


@pytest.mark.parametrize("spec", ["lyapunov:warmup=3", "fixed:warmup=3", "stability:warmup=3"])
def test_warm_up_counts_different_sigmas_and_not_evaluations(spec):
    """A sampler of two evaluations a step was out of its warm-up with two sigmas seen, through which no line leads on."""
    found = [d.why == "warm-up" for d in watched(build("monitor", spec), 1, TWICE, [None, *[0.01] * 10])]
    assert found == [True] * 5 + [False] * 6


def test_a_first_estimate_comes_from_a_full_set_of_nodes():
    """The error of a forecast through one node is that of a repetition: it says nothing of a line's, and was scaled as if it did."""
    sigmas = [1 - i / 24 for i in range(5)]
    found = watched(build("monitor", "lyapunov:warmup=1"), 1, sigmas, [None, 0.001, 0.02, 0.02, 0.02])
    assert [d.error_estimate for d in found[:3]] == [None] * 3, "two nodes are there at the third sigma, no error through them"
    assert [d.why for d in found[:3]] == ["warm-up", "no forecast to judge by", "no forecast to judge by"]
    assert found[3].error_estimate == pytest.approx(0.02), "of the error at the sigma before, on an even grid"


def test_a_repeat_of_a_sigma_is_judged_by_the_errors_of_repeats():
    """No distance in sigma tells how far apart two evaluations at one sigma are: that such a forecast is exact was never true."""
    monitor = build("monitor", "lyapunov:warmup=1,tau=.06")
    errors = [None, *[0.001, 0.5] * 5]  # of the first evaluation at a sigma, and of the second one
    found = watched(monitor, 1, TWICE, errors)
    repeats, firsts = found[2::2], found[5::2]
    assert all(d.error_estimate >= 0.5 and d.why == "estimate over the tolerance" for d in repeats[1:])
    assert not any(d.compute for d in firsts), "the others are judged by their own errors"
    first_repeat = watched(monitor, 1, [1, 0.96, 0.92, 0.88, 0.88], [None, *[0.001] * 4])[-1]
    assert (first_repeat.error_estimate, first_repeat.why) == (None, "no forecast to judge by")


@pytest.mark.parametrize("name", [n for n in names("scorer") if n not in ("fisher", "snr")])
def test_a_scorer_changes_the_bits_that_tokens_get(name):
    """Beside ``snr`` and ``fisher``, which speak of steps: see their own tests."""
    x = rnd(1, 64, 64) * torch.linspace(0.1, 3, 64)[None, :, None]
    before = x.roll(1, 1) + 0.1 * rnd(1, 64, 64)
    fine = []
    for scorer in (None, build("scorer", name)):
        where, strategy = stream(grid=(8, 8)), build("strategy", "tiered")
        for i, y in enumerate((before, x)):
            score = scorer.score(y, Step(i, 1 - i / 8), where) if scorer else None
            where.hold(strategy.plan(y, score, where, Step(i, 1 - i / 8)), y, Step(i, 1 - i / 8))
            where.decoded.clear()
        fine.append(where.state["fine"])
    assert not torch.equal(*fine)


def decisions(scorer, tau):
    recorder = Recorder(lambda: flow.nbytes)
    flow = Flow(tqai.Config(scorer=scorer, monitor={"name": "lyapunov", "tau": tau}), recorder)
    a, b = torch.randn(2, 2, 32, 64, generator=torch.Generator().manual_seed(3)).unbind()
    recorder.begin()
    for i in range(24):
        flow.enter(Step(i, 1 - i / 24, 24, i == 23))
        flow.apply(Where("model"), lambda i=i: a + torch.sin(3 * (1 - i / 24) * b.abs()))
    return flow.importance, [d["action"] for d in recorder.report.decisions]


@pytest.mark.parametrize("name", [n for n in names("scorer") if n not in ("fisher", "snr")])
def test_a_scorer_changes_what_the_monitor_tolerates(name):
    """The mean score of a computed step is the importance of the next."""
    assert decisions(None, 0.05)[0] is None
    assert 0 <= decisions(name, 0.05)[0] <= 1
    assert any(decisions(None, tau)[1] != decisions(name, tau)[1] for tau in (0.02, 0.03, 0.05, 0.08, 0.12))


@pytest.mark.parametrize(
    "config, silent",
    [
        ({"scorer": "palm", "monitor": "fixed"}, True),
        ({"scorer": "snr", "monitor": "schedule:total=24"}, True),
        ({"scorer": "palm", "monitor": "fixed", "level": "block"}, True),
        ({"scorer": "snr", "monitor": "fixed", "strategy": "tiered"}, True),  # it scores steps, tiered asks for tokens
        ({"scorer": "palm", "monitor": "fixed", "strategy": "window", "level": "attention"}, True),
        ({"scorer": "palm", "monitor": "fixed", "strategy": "tiered"}, False),
        ({"scorer": "bsa", "monitor": "fixed", "strategy": "window", "level": "attention"}, False),
        ({"scorer": "snr", "monitor": "lyapunov"}, False),
        ({"scorer": "palm", "monitor": "stability"}, False),
        ({"monitor": "fixed"}, False),
    ],
)
def test_a_scorer_that_changes_nothing_says_so(config, silent):
    recorder = Recorder(lambda: 0)
    flow = Flow(tqai.Config(**config), recorder)
    for _ in range(2):
        recorder.begin()
        flow.begin()
        for i in range(3):
            flow.enter(Step(i, 1 - i / 24, 24))
        assert [f"scorer '{flow.scorer.name}' changes nothing" in text for text in recorder.report.warnings] == [True] * silent


def test_window_names_its_level():
    with pytest.raises(ValueError, match="attention"):
        tqai.Config(strategy="window")


def test_window_scales_each_token_s_slope_by_how_well_it_predicted():
    """Half of the tokens go straight on, the other half jump about: the first are extrapolated, the others hardly."""
    g = torch.Generator().manual_seed(0)
    start, pace, noise = torch.randn(3, 1, 32, 64, generator=g)
    steady = torch.arange(32) < 16
    strategy = build("strategy", "window")
    stream = Stream(build("codec", "exact"))

    def exact(i):
        jump = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(100 + i))
        return start + torch.where(steady[:, None], -i / 24 * pace * 8, jump * noise.abs())

    for i in (0, 1, 2, 6):
        step = Step(i, 1 - i / 24, 24)
        stream.hold(strategy.plan(exact(i), None, stream, step), exact(i), step)
    gain = stream.state["trend_gain"].float().view(-1)
    assert gain[steady].min() > 0.99
    assert gain[~steady].mean() < 0.3
    assert stream.nbytes >= stream.state["trend_gain"].numel() * 2 + 2 * start.numel() * 4
    error = lambda guess: (guess - exact(8)).square().sum()
    ahead = Step(8, 1 - 8 / 24, 24)
    scaled = error(strategy.forecast(stream, ahead))
    stream.state.pop("trend_gain")
    assert scaled < error(strategy.forecast(stream, ahead)) * 0.8


def test_a_residual_of_order_0_fades_as_it_did_and_never_grows():
    strategy = build("strategy", "window:residual=0")
    stream = Stream(build("codec", "exact"))
    start = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
    pace = torch.tensor([-2.0, -0.5, 0.0, 3.0])[None, :, None]  # of sigma's change: the first is gone after half of it
    for sigma in (1.0, 0.8):
        step = Step(int(10 * (1 - sigma)), sigma, 10)
        x = start * (1 + pace * (1 - sigma))
        stream.hold(strategy.plan(x, None, stream, step), x, step)
    guess = strategy.forecast(stream, Step(4, 0.6, 10))
    gone = torch.tensor([0.4, 0.1, 0.0, 0.0])[None, :, None]  # between the two; what grew stays
    assert torch.allclose(guess, x * (1 - strategy.fade * gone), rtol=2e-3)
    assert torch.equal(strategy.forecast(stream, Step(9, -5.0, 10))[0, 0], torch.zeros(64)), "it does not turn its sign"
