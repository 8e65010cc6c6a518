"""``tqai bench pipelines``: which pipelines of diffusers tqai, diffusers' own caches and cache-dit take, counted by running them.

Each family of ``tests/pipelines`` is the real pipeline class with tiny random weights, so that a family costs a second. Of tqai: the
transformer calls of an exact run and of one that forecasts every second step, and the NMSE of all outputs of that run and of plain reuse
at the same steps. A peer is switched on as its documentation says, without help, at loose settings; it takes a pipeline if the run
ends, its outputs are finite and fewer layers were computed than in the exact run. diffusers' caches are switched on by ``enable_cache``
where the transformer has it, else by their function, which the table counts apart. Quality is no matter of random weights: see ``dit``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import CacheMixin
from torch import Tensor, nn

import tqai_core as tqai
from tqai_core.metrics import nmse

from . import dit_caches
from .harness import Row, Table, closing, machine, medians, one_thread, promises

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
bed = importlib.import_module("pipelines")

STEPS = 24
HALF = "fixed:interval=2,min_steps=4"
DIFFUSERS: dict[str, Callable[[Any], Callable[[], None]]] = {
    "FirstBlockCache": partial(dit_caches.first_block, threshold=0.3),
    "PAB": partial(dit_caches.pab, low=-1, high=1001),
    "TaylorSeer": partial(dit_caches.taylor_seer, interval=3),
    "SeaCache": partial(dit_caches.sea_cache, threshold=0.5),
    "FasterCache": partial(dit_caches.faster_cache, distilled=True),
}  # MagCache wants ratios that were calibrated on the model
PEERS = {**DIFFUSERS, "cache-dit": partial(dit_caches.db_cache, threshold=0.5, steps=STEPS)}
NO_FLOW = ("allegro", "cogvideox", "latte", "stable_audio")  # families whose model predicts noise, v or the clean picture
INSTALL = "pip install --no-deps cache-dit==1.5.3 pyyaml packaging"


class Layers:
    """Counts every layer of the transformers that is computed: what a cache of any kind saves."""

    def __init__(self, pipe: Any) -> None:
        self.calls = 0
        for model in bed.base.denoisers(pipe).values():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_pre_hook(self._hit)

    def _hit(self, *_: Any) -> None:
        self.calls += 1


def worst(outputs: list[Tensor], exact: list[Tensor]) -> float:
    """NMSE of the output, or of the worse one of picture and sound."""
    return max(nmse(x, true) for x, true in zip(outputs, exact, strict=True))


def ours(name: str, seed: int) -> Row:
    """What tqai does to one family."""
    family = bed.family(name)
    pipe = family.pipe()
    counter = bed.base.Computed(pipe)
    exact = family.call(pipe, STEPS, seed)
    calls = counter.take()

    def forced(strategy: str) -> tuple[float, int, Any]:
        with tqai.apply(pipe, tqai.Config(strategy=strategy, monitor=HALF)) as handle:
            outputs = family.call(pipe, STEPS, seed)
            return worst(outputs, exact), counter.take(), handle.report()

    error, computed, report = forced("delta2")
    reused, _, _ = forced("delta")
    removed = all(map(torch.equal, family.call(pipe, STEPS, seed), exact))
    models = bed.base.denoisers(pipe).values()
    kinds = sorted({type(model).__name__ for model in models})
    return dict(
        family=name, pipeline=type(pipe).__name__, transformer=", ".join(kinds), outputs=len(exact), calls=calls, forced=computed,
        nmse=error, nmse_reuse=reused, removed_exact="yes" if removed else "NO",
        enable_cache="yes" if all(isinstance(model, CacheMixin) for model in models) else "no",
        why="" if report.calls_skipped else "; ".join(dict.fromkeys(fallback["why"] for fallback in report.fallbacks)),
    )  # fmt: skip


def beside(name: str, labels: Sequence[str]) -> dict[str, Row]:
    """What the peers do to one family, each on a pipeline of its own."""
    pipe = bed.family(name).pipe()
    layers = Layers(pipe)
    exact = bed.family(name).call(pipe, STEPS, 0)
    return {label: peer(name, PEERS[label], exact, layers.calls) for label in labels}


def peer(name: str, enable: Callable[[Any], Callable[[], None]], exact: list[Tensor], all_layers: int) -> Row:
    """Whether it takes the pipeline: the share of layers computed and the NMSE, or why not."""
    pipe = bed.family(name).pipe()
    layers = Layers(pipe)
    undo: Callable[[], None] = lambda: None  # noqa: E731
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # modular pipelines log what they raise
    try:
        undo = enable(pipe)
        outputs = bed.family(name).call(pipe, STEPS, 0)
    except Exception as error:  # whatever a library raises where it does not fit
        return {"takes": False, "why": " ".join(f"{type(error).__name__}: {error}".split())[:120]}
    finally:
        with suppress(Exception):
            undo()
        logging.disable(before)
    if not all(x.isfinite().all() for x in outputs):
        return {"takes": False, "why": "NaN or inf"}
    if layers.calls >= all_layers:
        return {"takes": False, "why": "saves nothing"}
    return {"takes": True, "layers": layers.calls / all_layers, "nmse": worst(outputs, exact)}


def missing() -> dict[str, str]:
    out = {name: why for name, why in dit_caches.absent().items() if name in PEERS}
    if importlib.util.find_spec("cache_dit") is None:
        out["cache-dit"] = INSTALL
    return out


def bench(seeds: Sequence[int] = (0, 1, 2), peers: bool = True, tell: Callable[[str], None] = print, names: Sequence[str] = ()) -> Row:
    one_thread()
    absent, rows = missing(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names or bed.NAMES:
            row = medians(ours(name, seed) for seed in seeds)
            row["peers"] = beside(name, [label for label in PEERS if label not in absent]) if peers else {}
            rows.append(row)
            tell(f"{name}: {row['calls']:g} -> {row['forced']:g} calls")
    classes, refused = bed.family("base_classes").flow_transformers(), []
    for kind in classes.values():
        try:
            tqai.apply(bed.family("base_classes").empty(kind), tqai.Config(), steps=STEPS).remove()
        except tqai.TqaiError as error:
            refused.append(f"{kind.__name__}: {error}")
    counts = coverage(rows) | {"classes": len(classes), "classes_taken": len(classes) - len(refused), "refused": refused}
    return {
        "machine": machine(), "steps": STEPS, "seeds": list(seeds), "rows": rows, "coverage": counts, "missing": absent,
        "verdicts": verdicts(rows, counts),
    }  # fmt: skip


def coverage(rows: list[Row]) -> Row:
    """Pipelines that each one takes, of all but those of noise or v-prediction."""
    flow = [row for row in rows if row["family"] not in NO_FLOW]
    any_of = lambda *labels, rows=flow: sum(any(takes(row, label) for label in labels) for row in rows)  # noqa: E731
    switch = [row for row in flow if row["enable_cache"] == "yes"]
    either = sum(takes(row, "cache-dit") or (row in switch and any(takes(row, label) for label in DIFFUSERS)) for row in flow)
    return {
        "families": len(rows),
        "flow": len(flow),
        "tqai": sum(row["forced"] < row["calls"] for row in flow),
        "enable_cache": any_of(*DIFFUSERS, rows=switch),
        "diffusers": any_of(*DIFFUSERS),
        "enable_cache_or_cache_dit": either,
        "peers_together": any_of(*PEERS),
        **{label: any_of(label) for label in PEERS},
    }


def takes(row: Row, label: str) -> bool:
    return bool(row["peers"].get(label, {}).get("takes"))


def verdicts(rows: list[Row], counts: Row) -> list[Row]:
    out: list[Row] = []
    need = promises(out)
    forecast = [row for row in rows if row["forced"] < row["calls"]]
    need("families that run and are forecast", len(forecast), least=30)
    need("of these, closer than reuse at the same steps", sum(row["nmse"] < row["nmse_reuse"] for row in forecast), least=len(forecast))
    need("bit-exact after remove()", sum(row["removed_exact"] == "yes" for row in rows), least=len(rows))
    need("flow transformer classes taken", counts["classes_taken"], least=50)
    for what, key in (
        ("enable_cache and cache-dit together", "enable_cache_or_cache_dit"),
        ("all peers' functions together", "peers_together"),
    ):
        need(f"flow pipelines taken, more than {what}", counts["tqai"] - counts[key], least=1)
    return out


def tables_of(result: Row) -> Iterator[Table]:
    labels = [label for label in PEERS if label not in result["missing"]]
    head = ["family", "pipeline", "transformer", "calls", "forced", "NMSE", "reuse", "diffusers' caches", "cache-dit"]
    yield "pipelines", head, [_cells(row) for row in result["rows"]]
    counts = result["coverage"]
    by = {
        "tqai": "tqai", "diffusers' enable_cache": "enable_cache", "enable_cache or cache-dit": "enable_cache_or_cache_dit",
        "any function of a peer": "peers_together", **{label: label for label in labels},
    }  # fmt: skip
    yield "flow pipelines taken", ["by", "pipelines"], [[name, f"{counts[key]} of {counts['flow']}"] for name, key in by.items()]
    yield from closing(result)


def _cells(row: Row) -> list[str]:
    caches = [label for label in DIFFUSERS if takes(row, label)]
    errors = ["exact", row["why"]] if row["why"] else [f"{row['nmse']:.1e}", f"{row['nmse_reuse']:.1e}"]
    figures = [f"{row['calls']:g}", f"{row['forced']:g}", *errors]
    return [
        row["family"],
        row["pipeline"],
        row["transformer"],
        *figures,
        ", ".join(caches) or "none",
        "yes" if takes(row, "cache-dit") else "no",
    ]
