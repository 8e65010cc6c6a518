"""Real pipelines of diffusers with tiny random weights, as they come: off, forced every second step, again, removed."""

from __future__ import annotations

import gc
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers")
sys.path.append(str(Path(__file__).parent))
import pipelines
from bench import pipelines as bench
from pipelines import base_classes

import tqai_core as tqai
from tqai_core.metrics import nmse

STEPS = 24
HALF = "fixed:interval=2,min_steps=4"  # forecasts every second step between the first three and the last; a cut schedule is shorter
OFF = {"no monitor": tqai.Config(monitor=None), "tau 0": tqai.Config(monitor="lyapunov:tau=0,min_steps=4")}
every_family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in pipelines.FAST else pytest.mark.slow) for name in pipelines.NAMES]
)


def forced(strategy: str) -> tqai.Config:
    return tqai.Config(strategy=strategy, monitor=HALF)


@dataclass
class Run:
    """One generation: its outputs, the evaluations that its transformers made, tqai's report, and the bytes it left behind."""

    outputs: list[Tensor]
    computed: int
    report: tqai.Report | None = None
    left: int = 0


class Bed:
    """One family's pipeline and its runs, each made once, one seed for all."""

    def __init__(self, name: str) -> None:
        self.family = pipelines.family(name)
        self.pipe = self.family.pipe()
        self.counter = pipelines.base.Computed(self.pipe)
        self.before = traces(self.pipe)
        self.exact = self.go()

    def go(self) -> Run:
        outputs = self.family.call(self.pipe, STEPS, 0)
        return Run(outputs, self.counter.take())

    def patched(self, config: tqai.Config, times: int = 1) -> list[Run]:
        """Runs with tqai on the pipeline."""
        runs = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="tqai: nothing was skipped")
            with tqai.apply(self.pipe, config) as handle:
                for _ in range(times):
                    run = self.go()
                    run.report, run.left = handle.report(), held(handle, self.pipe)
                    assert handle.nbytes == 0
                    runs.append(run)
        return runs

    @cache  # noqa: B019  # a bed lives as long as the session
    def forced(self) -> tuple[Run, Run, Run]:
        """Two runs that forecast by a line, and one that reuses, all three at the same steps."""
        return *self.patched(forced("delta2"), times=2), *self.patched(forced("delta"))


def traces(pipe: Any) -> list[tuple[str, set[str]]]:
    """The names that every module of the denoisers has for itself: what a patch that was removed must not change."""
    return [
        (name, set(vars(module)) - {"_diffusers_hook"}) for model in pipelines.base.denoisers(pipe).values()
        for name, module in model.named_modules()
    ]  # fmt: skip


def held(handle: Any, pipe: Any) -> int:
    """Bytes of the tensors that tqai's own objects lead to, walked; neither weights nor what the pipeline's schedulers hold."""
    seen = {id(value) for part in pipe.components.values() if hasattr(part, "timesteps") for value in vars(part).values()}

    def walk(value: Any) -> int:
        if id(value) in seen or isinstance(value, nn.Module | type):
            return 0
        seen.add(id(value))
        if isinstance(value, Tensor):
            return value.untyped_storage().nbytes()
        if isinstance(value, dict):
            return sum(walk(part) for part in [*value.keys(), *value.values()])
        if isinstance(value, list | tuple | set | frozenset):
            return sum(walk(part) for part in value)
        own = type(value).__module__.startswith("tqai_core")
        return sum(walk(part) for part in gc.get_referents(value) if not callable(part)) if own else 0

    hooks = [
        model._diffusers_hook.get_hook("tqai") for model in pipelines.base.denoisers(pipe).values() if "_diffusers_hook" in vars(model)
    ]
    return walk([handle, hooks])


bed = cache(Bed)


@every_family
def test_a_pipeline_of_the_bed_runs_by_its_seed_alone(name):
    """Else none of the other tests would say anything."""
    here, again = bed(name).exact, bed(name).go()
    assert here.outputs
    assert all(map(torch.equal, here.outputs, again.outputs))
    assert here.computed == again.computed >= STEPS // 2
    assert all(x.isfinite().all() and x.std() > 0.1 for x in here.outputs)
    other = bed(name).family.call(bed(name).pipe, STEPS, 1)
    assert not any(map(torch.equal, here.outputs, other))
    bed(name).counter.take()


@every_family
@pytest.mark.parametrize("off", OFF)
def test_off_is_bit_exact(name, off):
    (run,) = bed(name).patched(OFF[off])
    assert all(map(torch.equal, run.outputs, bed(name).exact.outputs))
    assert run.computed == bed(name).exact.computed
    assert run.report.calls_skipped == 0
    assert run.left == 0


@every_family
def test_every_second_step_is_forecast_closer_than_reused(name):
    exact, (run, _, reuse) = bed(name).exact, bed(name).forced()
    if no_flow := getattr(bed(name).family, "EXACT", ""):
        assert all(map(torch.equal, run.outputs, exact.outputs))
        assert run.report.calls_skipped == 0
        assert no_flow in " ".join(fallback["why"] for fallback in run.report.fallbacks)
        return
    assert run.report.calls_skipped >= 0.3 * run.report.calls, run.report.fallbacks
    chunks = getattr(bed(name).family, "CHUNKS", 1)
    assert run.computed == exact.computed - chunks * run.report.calls_skipped, "the report counts what the model did not compute"
    assert run.computed == reuse.computed, "the same steps"
    assert len(run.outputs) == len(exact.outputs) == len(reuse.outputs)
    for ours, theirs, true in zip(run.outputs, reuse.outputs, exact.outputs, strict=True):
        assert ours.isfinite().all()
        assert 0 < nmse(ours, true) < nmse(theirs, true), "each output, the sound too"


@every_family
def test_a_second_run_is_the_first(name):
    first, second, _ = bed(name).forced()
    assert all(map(torch.equal, first.outputs, second.outputs))
    assert first.computed == second.computed
    assert first.left == second.left == 0


@every_family
def test_removed_is_bit_exact_and_leaves_nothing(name):
    bed(name).forced()
    assert traces(bed(name).pipe) == bed(name).before
    run = bed(name).go()
    assert all(map(torch.equal, run.outputs, bed(name).exact.outputs))
    assert run.computed == bed(name).exact.computed


def test_the_walk_finds_what_is_held_during_a_run():
    made, found = bed("qwenimage"), []
    with tqai.apply(made.pipe, forced("delta2")) as handle:
        watch = made.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
            lambda *_: found.append((held(handle, made.pipe), handle.nbytes))
        )
        made.go()
        watch.remove()
    assert max(walked for walked, _ in found) >= max(counted for _, counted in found) > 0


def test_every_transformer_of_a_flow_pipeline_is_taken():
    kinds, refused = base_classes.flow_transformers(), {}
    for name, kind in kinds.items():
        try:
            tqai.apply(base_classes.empty(kind), tqai.Config(), steps=24).remove()
        except tqai.TqaiError as error:
            refused[name] = str(error)
    assert len(kinds) >= 54
    assert len(kinds) - len(refused) >= 50, refused
    assert not refused


def test_the_bench_counts_what_ran():
    result = bench.bench(seeds=(0,), peers=False, tell=lambda text: None, names=("zimage",))
    (row,) = result["rows"]
    assert row["pipeline"] == "ZImagePipeline"
    assert row["transformer"] == "ZImageTransformer2DModel"
    assert (row["calls"], row["forced"], row["removed_exact"], row["enable_cache"]) == (24, 14, "yes", "no")
    assert 0 < row["nmse"] < row["nmse_reuse"]
    counts, took, not_ = result["coverage"], {"takes": True}, {"takes": False}
    assert (counts["flow"], counts["tqai"], counts["peers_together"]) == (1, 1, 0)
    with_switch = {**row, "enable_cache": "yes"}
    counts = bench.coverage([
        {**row, "peers": {"PAB": took, "cache-dit": not_}}, {**with_switch, "peers": {"PAB": took, "FasterCache": took}},
        {**with_switch, "forced": 24, "peers": {"cache-dit": took}},
    ])  # fmt: skip
    assert (counts["tqai"], counts["PAB"], counts["FasterCache"], counts["cache-dit"]) == (2, 2, 1, 1)
    assert (counts["diffusers"], counts["enable_cache"]) == (2, 1), "by their functions, and by the transformer's own switch"
    assert (counts["enable_cache_or_cache_dit"], counts["peers_together"]) == (2, 3)
