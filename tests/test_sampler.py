"""The calibrated sampler: what is fitted, what is refused, and the scheduler in real pipelines."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn

import tqai_core as tqai
from tqai_core.calibrate.multistep import BatchBarrier, Multistep, RecordingSolver, equidistributed, grid
from tqai_core.calibrate.sampler import (
    CalibratedSampler,
    calibrate,
    entry_hash,
    errors,
    extend_guidance_range,
    guidance_range,
    reference,
)
from tqai_core.cli import main
from tqai_core.hosts.diffusers import minis
from tqai_core.hosts.diffusers.sampler import PipelineModel, SolverScheduler, transformers_of
from tqai_core.modelhash import model_hash

KNOBS = {"flux": "true_cfg_scale", "sd3": "guidance_scale", "wan": "guidance_scale"}


class Loop:
    """A bare transformer in a loop of its own, as the calibrator's model: ``velocity(x, sigma, seeds)`` and ``noise(seeds)``."""

    def __init__(self, module, velocity, noise, batch):
        self.module, self.velocity, self.noise, self.batch = module, velocity, noise, batch
        self.tick = lambda share: None

    def solve(self, seeds, make):
        batches = [seeds[i : i + self.batch] for i in range(0, len(seeds), self.batch)]
        barrier = BatchBarrier(len(batches))
        solvers = [make(k, barrier) for k in range(len(batches))]

        def run(k):
            x = self.noise(batches[k])
            for i, sigma in enumerate(solvers[k].nodes[:-1]):
                x = solvers[k].step(i, self.velocity(x, sigma, batches[k]), x)
                self.tick(len(batches[k]) / len(seeds))

        barrier.run([partial(run, k) for k in range(len(batches))])
        self.spent = solvers[0].steps
        return solvers

    def header(self):
        return {
            "models": {"transformer": model_hash(self.module)}, "model_class": "Linear", "entry": None, "shape": (12,), "versions": {},
            "guidance": guidance_range("guidance_scale", 1.0),
        }  # fmt: skip


def toy(batch: int = 8, stiff: float = 0.2) -> Loop:
    """A velocity that bends towards small sigma, where samples go to one of two sides."""

    def noise(seeds):
        return torch.cat([torch.randn(1, 12, generator=torch.Generator().manual_seed(s)) for s in seeds])

    def velocity(x, sigma, seeds):
        centre = torch.tanh(x / (sigma + stiff))  # denoised
        return (x - (1 - sigma) * centre) / (sigma + stiff) - centre

    module = nn.Linear(3, 3)
    module.weight.data = torch.arange(9.0).view(3, 3) - 4
    module.bias.data = torch.ones(3)
    return Loop(module, velocity, noise, batch=batch)


def test_a_fit_beats_adams_bashforth_on_seeds_it_never_saw():
    made = calibrate(toy(), 8, stock=("ab2",), reference_calls=200)
    held = made.held_out
    assert held["error"] < 0.5 * held["stock"]["error"]
    unseen = [1, 2, 3, 4]
    model = toy()
    exact = reference(model, unseen, 400)
    ours = errors(model, unseen, exact, (*made.nodes, 0.0), made.theta)["error"]
    assert ours < 0.7 * min(errors(model, unseen, exact, grid(8, s))["error"] for s in (1.0, 2.0, 3.0))
    assert set(held["grids"]) >= {"equidistributed", "half-way"}


def test_the_last_step_alone():
    made = calibrate(toy(), 8, form="last", shift=3.0, stock=("ab2",), reference_calls=200)
    assert all(not any(row) for row in made.theta[:-1])
    assert any(made.theta[-1])
    assert made.grid == "shift 3"
    assert made.held_out["before_last"] == pytest.approx(made.held_out["stock"]["before_last"])
    assert made.held_out["error"] < made.held_out["stock"]["error"]


def test_what_does_not_win_is_not_made():
    def straight(x, sigma, seeds):
        return torch.ones_like(x)  # every solver is exact here

    model = toy()
    model.velocity = straight
    with pytest.raises(ValueError, match=r"no file was made: with 6 steps .* Use that solver"):
        calibrate(model, 6, stock=("ab2",))


def test_batches_in_step_are_one_batch():
    one, apart = (calibrate(toy(batch), 6, stock=("ab2",)) for batch in (8, 1))
    assert one.nodes == pytest.approx(apart.nodes, abs=1e-6)
    assert torch.allclose(torch.tensor(one.theta), torch.tensor(apart.theta), atol=2e-3)


def test_an_error_in_one_batch_stops_all():
    barrier = BatchBarrier(3)
    ran = []

    def work(k):
        if k == 1:
            raise ValueError("batch 1")
        ran.append(float(barrier.total(k, torch.ones(()))))

    with pytest.raises(ValueError, match="batch 1"):
        barrier.run([lambda k=k: work(k) for k in range(3)])
    assert ran == []


def test_nodes_follow_the_change():
    nodes = grid(100, 1.0)
    flat = equidistributed(nodes, [1.0] * 99, 10)
    assert flat == pytest.approx(grid(10, 1.0), abs=1e-9)
    late = equidistributed(nodes, [1.0] * 79 + [100.0] * 20, 10)
    assert late[0] == 1.0
    assert late[-1] == 0.0
    assert all(a > b for a, b in pairwise(late))
    assert sum(s < 0.2 for s in late) > sum(s < 0.2 for s in flat)


def test_a_reference_knows_the_states_between_its_nodes():
    solver = RecordingSolver(grid(40, 1.0))
    x = torch.ones(2, 3)
    for i, s in enumerate(solver.nodes[:-1]):
        x = solver.step(i, torch.full_like(x, 3 * s * s), x)  # x = s^3 + constant
    assert float((solver.at(0.333) - solver.at(0.111)).mean()) == pytest.approx(0.333**3 - 0.111**3, abs=2e-3)
    assert torch.equal(solver.at(0.5), solver.states[20])


def test_the_first_steps_weigh_the_terms_they_have():
    """Step i has i slopes: its row is [h v], [h v, h^2 v'], [h v, h^2 v', h^2 (v' - v'_before)], and h x is always the last."""
    nodes, theta = grid(4, 1.0), [[0.5, 7.0, 70.0, 0.25], [0.5, 0.125, 90.0, 0.75], [0.5, 0.125, 0.0625, 0.375], [0.0] * 4]
    solver, x = Multistep(nodes, theta), torch.tensor([3.0])
    velocities = [torch.tensor([v]) for v in (1.0, 2.0, 5.0)]
    h = -0.25
    slope = [None, (2.0 - 1.0) / h, (5.0 - 2.0) / h]
    for i, v in enumerate(velocities):
        now = float(x)
        wanted = now + h * float(v) + (h * h / 2 * slope[i] if i else 0.0)  # Adams-Bashforth 2; Euler first
        wanted += theta[i][0] * h * float(v) + theta[i][3] * h * now
        if i:
            wanted += theta[i][1] * h * h * slope[i]
        if i == 2:
            wanted += theta[i][2] * h * h * (slope[2] - slope[1])
        x = solver.step(i, v, x)
        assert float(x) == pytest.approx(wanted, rel=1e-6), f"step {i}"


def test_plain_steps_are_adams_bashforth():
    """Exact for constant velocities from the first step on, for linear ones from the second on."""
    nodes, solver = grid(5, 2.0), Multistep(grid(5, 2.0))
    x = torch.zeros(1)
    for i, sigma in enumerate(nodes[:-1]):
        x = solver.step(i, torch.tensor([2 * sigma + 1]), x)
        if i == 0:
            assert float(x) == pytest.approx((nodes[1] - nodes[0]) * (2 * nodes[0] + 1))
            start = float(x) - (nodes[1] ** 2 + nodes[1])
        else:
            assert float(x) == pytest.approx(nodes[i + 1] ** 2 + nodes[i + 1] + start, abs=1e-6)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"steps": 2}, "3 or more"),
        ({"form": "first"}, "'all'"),
        ({"reference_calls": 20}, "too coarse"),
        ({"seeds": (1, 2), "held_out": (2, 3)}, "none twice"),
    ],
)
def test_bad_input(options, says):
    with pytest.raises(ValueError, match=says):
        calibrate(toy(), **{"steps": 8, "stock": ("ab2",)} | options)


def test_files_go_round_and_damage_is_noticed(sampler_file, tmp_path):
    path = sampler_file()
    sampler = CalibratedSampler.load(path)
    sampler.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    whole = json.loads(path.read_text())
    for change, says in (
        ({"format": "other"}, "no calibrated sampler"),
        ({"version": 99}, "upgrade"),
        ({"theta": whole["theta"][:-1]}, "finite weights"),
        ({"theta": [[float("nan")] * 4] * 6}, "no finite number"),
        ({"nodes": whole["nodes"][::-1]}, "do not fall"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(ValueError, match=says):
            CalibratedSampler.load(path)
    path.write_text(json.dumps(whole)[:-40])
    with pytest.raises(ValueError, match="damaged or no JSON"):
        CalibratedSampler.load(path)
    path.write_text(json.dumps({k: v for k, v in whole.items() if k != "nodes"}))
    with pytest.raises(ValueError, match="lacks nodes"):
        CalibratedSampler.load(path)
    with pytest.raises(ValueError, match="make one"):
        CalibratedSampler.load(tmp_path / "absent.json")


def test_guidance_is_widened_only_where_it_wins(monkeypatch):
    sampler = calibrate(toy(), 8, stock=("ab2",), reference_calls=200)
    model = toy()

    @dataclasses.dataclass
    class Same:
        def __enter__(self):
            return None

        def __exit__(self, *error):
            return None

    model.guided = lambda guidance: Same()
    wide = extend_guidance_range(model, sampler, 3.0)
    assert wide.guidance["high"] == 3.0
    assert wide.guidance["low"] == sampler.guidance["low"]
    wide.check(guidance=3.0)
    with pytest.raises(ValueError, match="good for"):
        sampler.check(guidance=3.0)
    bad = dataclasses.replace(sampler, theta=tuple((0.5, 0.5, 0.0, 0.5) for _ in sampler.theta))
    narrow = extend_guidance_range(model, bad, 3.0)
    assert narrow.guidance["high"] == bad.guidance["high"]
    assert narrow.guidance["proved"][0]["error"] > narrow.guidance["proved"][0]["stock"]


def test_the_first_layer_tells_models_apart():
    flux, sd3 = minis.transformer("flux"), minis.transformer("sd3")
    assert entry_hash(flux) != entry_hash(sd3)
    assert entry_hash(nn.Linear(2, 2)) is None
    renamed = nn.Module()
    renamed.img_in = nn.Linear(1, 1)  # ComfyUI's name of it
    renamed.img_in.weight = flux.x_embedder.weight
    assert entry_hash(renamed) == entry_hash(flux)
    assert entry_hash(renamed.to(torch.bfloat16)) == entry_hash(flux)


# --- in diffusers ------------------------------------------------------------------------------------------------------
@pytest.fixture
def door(sampler_file):
    """A mini's pipeline and a scheduler from a file made for it."""

    def make(kind: str, **over):
        pipe = minis.pipeline(kind)
        models = {name: model_hash(model) for name, model in transformers_of(pipe).items()}
        path = sampler_file(models=models, guidance=guidance_range(KNOBS[kind], 2.0), **over)
        pipe.scheduler = tqai.CalibratedScheduler.from_file(path)
        return pipe, path

    return make


def run(pipe, kind, steps=6, guidance=2.0, **kw):
    generator = torch.Generator().manual_seed(5)
    return pipe(
        **minis.inputs(kind, [3], guidance), num_inference_steps=steps, generator=generator, output_type="latent", return_dict=False, **kw
    )[0]  # fmt: skip


pytestmark = pytest.mark.filterwarnings("ignore:mu .the pipeline's shift. is ignored")


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan"])
def test_the_scheduler_walks_a_real_pipeline(door, kind):
    pipe, path = door(kind)
    out = run(pipe, kind)
    assert torch.equal(run(pipe, kind), out), "a second run is the same"
    sampler = CalibratedSampler.load(path)
    pipe.scheduler = SolverScheduler.of(sampler.solver(), lambda: None, lambda pipe, names: None)
    assert torch.equal(run(pipe, kind), out)
    pipe.scheduler = SolverScheduler.of(Multistep((*sampler.nodes, 0.0)), lambda: None, lambda pipe, names: None)
    assert not torch.allclose(run(pipe, kind), out, atol=1e-4), "the weights do something"


def test_what_the_scheduler_refuses(door, tmp_path):
    pipe, path = door("flux")
    with pytest.raises(ValueError, match=r"8 steps asked.*num_inference_steps=6"):
        run(pipe, "flux", steps=8)
    with pytest.raises(ValueError, match=r"true_cfg_scale=4 asked.*1\.6 to 2\.5"):
        run(pipe, "flux", guidance=4.0)
    with pytest.raises(ValueError, match="guidance_scale is in use"):
        run(pipe, "flux", guidance=1.0)
    pipe.transformer.proj_out.weight.data.neg_()
    with pytest.raises(ValueError, match="calibrate this model"):
        run(pipe, "flux")
    with pytest.raises(ValueError, match="calibrate this model"):
        tqai.CalibratedScheduler.from_file(path, model=pipe)
    with pytest.raises(ValueError, match="made by tqai calibrate"):
        tqai.CalibratedScheduler()
    scheduler = tqai.CalibratedScheduler.from_file(path)
    scheduler.set_timesteps(6)
    with pytest.raises(ValueError, match="img2img"):
        scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match="img2img"):
        scheduler.scale_noise(torch.zeros(1), 500.0, torch.zeros(1))
    with pytest.raises(ValueError, match="img2img"):
        scheduler.step(torch.zeros(1), scheduler.timesteps[2], torch.zeros(1))
    with pytest.raises(ValueError, match="no number of steps"):
        scheduler.set_timesteps()


def test_a_sampler_fitted_with_the_difference_wants_it_applied(door):
    from tqai_core.hosts.diffusers.sampler import DIFFERENCE

    pipe, _ = door("sd3", difference=DIFFERENCE.to_json())
    with pytest.raises(ValueError, match=r"tqai\.apply\(pipe"):
        run(pipe, "sd3")
    with tqai.apply(pipe, tqai.Config.from_json(pipe.scheduler.calibrated.difference)) as handle:
        run(pipe, "sd3")
        assert handle.report().calls_skipped > 0


def test_pretrained_round_trip(door, tmp_path):
    pipe, _ = door("sd3")
    out = run(pipe, "sd3")
    pipe.scheduler.save_pretrained(tmp_path / "saved")
    pipe.scheduler = tqai.CalibratedScheduler.from_pretrained(tmp_path / "saved")
    assert torch.equal(run(pipe, "sd3"), out)


def test_state_stays_in_fp32_unless_somebody_changes_the_latents():
    nodes, g = grid(50, 2.0), torch.Generator().manual_seed(0)
    exact = x = torch.randn(64, generator=g)
    low = x.bfloat16()
    scheduler = SolverScheduler.of(Multistep(nodes), lambda: None, lambda pipe, names: None)
    scheduler.set_timesteps(50)
    solver = Multistep(nodes)
    for i, t in enumerate(scheduler.timesteps):
        v = torch.randn(64, generator=g).bfloat16()
        exact = solver.step(i, v, exact)
        low = scheduler.step(v, t, low).prev_sample
    assert torch.equal(low, solver_start(exact, x).bfloat16())
    scheduler.set_timesteps(50)
    first = scheduler.step(torch.zeros(64), scheduler.timesteps[0], x).prev_sample
    changed = scheduler.step(torch.zeros(64), scheduler.timesteps[1], first + 1).prev_sample
    assert torch.allclose(changed, x + 1)


def solver_start(exact, x):
    """The scheduler began at bf16(x)."""
    return exact - x + x.bfloat16().float()


def test_a_pipeline_is_calibrated_and_left_as_it_was():
    pipe = minis.pipeline("flux")
    before = pipe.scheduler
    model = PipelineModel(pipe, lambda seeds: minis.inputs("flux", [s % 5 for s in seeds]), batch=1)
    made = calibrate(model, 6, seeds=(7700, 7701), held_out=(8800,), reference_calls=32, tune=1, stock=("ab2",))
    assert pipe.scheduler is before
    assert made.guidance["name"] == "true_cfg_scale"
    assert made.guidance["made"] == 2.0
    assert made.models == {"transformer": model_hash(pipe.transformer)}
    assert made.calls == 6
    again = calibrate(model, 6, seeds=(7700, 7701), held_out=(8800,), reference_calls=32, tune=1, stock=("ab2",))
    assert again == made, "seeds are fixed"
    exact = reference(model, [3], 96)
    ours = errors(model, [3], exact, (*made.nodes, 0.0), made.theta)["error"]
    assert ours < min(errors(model, [3], exact, grid(6, s))["error"] for s in (1.0, 2.0, 3.0))


def test_the_command(tmp_path, capsys):
    path = tmp_path / "flux.json"
    small = ["--steps", "6", "--teacher", "32", "--samples", "1", "--held-out", "1"]
    assert main(["calibrate", "--sampler", "--demo", "flux", "-o", str(path), *small, f"--json={tmp_path / 'told.json'}"]) == 0
    assert "calibrated" in capsys.readouterr().out
    sampler = CalibratedSampler.load(path)
    assert sampler.steps == 6
    assert sampler.held_out["stock"]["name"] in ("ab2", "unipc", "dpm++")
    assert json.loads((tmp_path / "told.json").read_text())["seconds_cpu"] > 0
    for words, says in (
        (["--sampler"], "either -m MODEL or --demo"),
        (["--sampler", "--demo", "sdxl"], "invalid choice: 'sdxl'"),
        (["--sampler", "--demo", "flux", "--samples", "0"], "--samples 0: give a whole number, 1 to 1000"),
        (["--sampler", "-m", str(tmp_path / "nowhere")], "cannot load"),
    ):
        assert main(["calibrate", "-o", str(tmp_path / "none.json"), *words]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_results_say_what_their_rows_say():
    from pathlib import Path

    from bench import sampler as bench

    result = json.loads((Path(__file__).parents[1] / "benchmarks/results/sampler.json").read_text())
    assert [v for kind, table in result["tables"].items() for v in bench.verdicts(kind, table)] == result["verdicts"]
    assert len(bench.tables_of(result)) == 3 * len(result["tables"]) + 1
    table = result["tables"]["flux"]
    worse = [r | {"ode": r["ode"] * 100} if r["method"].startswith("calibrated, 1") else r for r in table["rows"]]
    assert not all(v["ok"] for v in bench.verdicts("flux", table | {"rows": worse})), "a promise can fail"
