"""``tqai calibrate``: probes, moments, bases, bits; resumable."""

from __future__ import annotations

import json
import platform
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import TqaiError
from ..files import check_tensor, checked, write_tensors
from ..hosts.attention_interceptor import blocks_of
from ..hosts.calibration_targets import CalibrationTarget, Diffusion, Language
from ..modelhash import model_hash
from ..progress import Progress, silent
from . import basis, policy
from .caches import tables as cache_tables
from .file import FIELD, FORMAT, UNFINISHED, WIDTHS, Calibration, codecs_of, read
from .fisher import Sums, probe

SEEDS = (100, 101, 102, 103)
HELD_OUT = 104  # verdicts on bases
MOMENT = re.compile(r"\d{1,4}/(?:[kv](?:/count)?|mean|k2|q2|n)")  # names of running sums
CHOICE, VALIDATION = (105,), (106, 107)  # of an allocation, and its verdict


def calibrate(
    target: CalibrationTarget,
    path: Path,
    seeds: Sequence[int] = SEEDS,
    probes: int | None = None,
    bits: int = 4,
    average: int = 3,
    codec: str = "turbo",
    progress: Progress = silent,
) -> Calibration:
    """Measure ``target`` and write ``path``. A stopped run leaves a partial file beside it, and the same call continues it.

    ``probes`` backward passes a call; ``bits`` of the KLT bases; ``average`` bits of the allocation; ``codec`` the quantiser
    whose errors are weighed. Raises ValueError for settings that cannot be, and a model whose attention is not found.
    """
    check_seeds(seeds)
    probes = target.probes if probes is None else probes
    if probes < 1:
        raise TqaiError(f"probes={probes}: give 1 or more")
    name, began, total = model_hash(target.model), time.process_time(), len(seeds) + 1
    settings = {
        "model": name, "class": type(target.model).__name__, "kind": target.kind,
        "family": target.family.name if isinstance(target, Diffusion) else "", "seeds": list(seeds), "probes": probes,
        "codec": codec, "basis_bits": bits, "average": average, "steps": getattr(target, "steps", None),
    }  # fmt: skip
    partial = path.with_name(path.name + UNFINISHED)
    moments, sums, done = _resume(partial, settings, target) if partial.exists() else (basis.Moments(), None, 0)
    for nth, seed in enumerate(seeds[done:], start=done):
        part = lambda text, share, nth=nth, seed=seed: progress(f"seed {seed}: {text}", (nth + share) / total)  # noqa: E731
        sums = _measure(target, seed, probes, codec, moments, sums, part)
        _keep(partial, settings, moments, sums, nth + 1, target.sigmas)
    assert sums is not None
    tables = sums.tables() | {"sigmas": torch.tensor(target.sigmas)}
    progress("verdicts on bases", len(seeds) / total)
    bases, verdicts = basis.judge(target, moments, bits, HELD_OUT, name)
    progress("verdict on bits", (len(seeds) + 0.5) / total)
    tables["bits"], verdict = policy.allocate(target, tables["damage"], average, codec, CHOICE, VALIDATION)
    verdicts_of = {"bases": verdicts, "bits": verdict}
    if isinstance(target, Language):
        progress("verdict on caches", (len(seeds) + 0.8) / total)
        found, verdicts_of["cache"] = cache_tables(target)
        tables |= moments.keys() | found
    header = {
        **settings, "held_out": HELD_OUT, "samples": sums.samples.int().tolist(), "seconds_cpu": time.process_time() - began,
        "verdicts": verdicts_of,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version(), "format": FORMAT},
    }  # fmt: skip
    made = Calibration(header, tables, bases)
    made.save(path)
    partial.unlink(missing_ok=True)
    progress("done", 1.0)
    return made


def check_seeds(seeds: Sequence[int]) -> None:
    """TqaiError for seeds that are given twice or are those of the verdicts."""
    if len(set(seeds)) != len(seeds) or not seeds:
        raise TqaiError(f"seeds {list(seeds)}: give one or more, each once")
    if taken := set(seeds) & {HELD_OUT, *CHOICE, *VALIDATION}:
        raise TqaiError(f"seeds {sorted(taken)} are kept for the verdicts: give others")


def _measure(
    target: CalibrationTarget, seed: int, probes: int, codec: str, moments: basis.Moments, sums: Sums | None, progress: Progress
) -> Sums:
    """One run of ``seed`` into ``moments``, and probes at its calls into ``sums`` (made here for the first seed)."""
    progress("a run", 0.0)
    calls = target.record(seed, moments.see)
    if sums is None:
        heads = {len(moments.sums[f"{layer}/mean"]) for layer in moments.layers}
        if moments.layers != list(range(len(blocks_of(target.model)))) or len(heads) != 1:
            raise TqaiError(
                f"{type(target.model).__name__}: attention was seen in layers {moments.layers} with {sorted(heads)} heads; "
                "calibration needs one self-attention a layer through scaled_dot_product_attention, alike in all"
            )
        sums = Sums(len(moments.layers), heads.pop(), len(target.sigmas))
    codecs = codecs_of(codec)
    for i, (band, call) in enumerate(calls):
        progress("sensitivity", (i + 1) / (len(calls) + 1))
        for p in range(probes):
            probe(target, band, call, sums, codecs, torch.Generator().manual_seed(seed * 1_000_003 + i * 1009 + p))
    return sums


def _keep(partial: Path, settings: dict[str, Any], moments: basis.Moments, sums: Sums, done: int, sigmas: Sequence[float]) -> None:
    tensors: dict[str, Tensor] = {f"moments/{name}": x.contiguous() for name, x in moments.sums.items()}
    tensors |= {f"sums/{name}": x for name, x in vars(sums).items()}
    header = {"format": FORMAT, "complete": False, "done": done, "sigmas": list(sigmas), **settings}
    write_tensors(partial, tensors, {FIELD: json.dumps(header)})


def _resume(partial: Path, settings: dict[str, Any], target: CalibrationTarget) -> tuple[basis.Moments, Sums, int]:
    header, tensors = read(partial)
    checked("Unfinished", header, what=f"{partial}: calibration", again="delete it and calibrate again")
    if differing := [key for key, value in settings.items() if header.get(key) != value]:
        raise TqaiError(
            f"{partial} was begun with other settings ({', '.join(f'{k}={header.get(k)!r}' for k in differing)}): "
            "give the same ones to go on, or delete it"
        )
    moments = basis.Moments()
    moments.sums = {name.removeprefix("moments/"): x for name, x in tensors.items() if name.startswith("moments/")}
    if any(x.dtype != torch.float32 or not MOMENT.fullmatch(name) for name, x in moments.sums.items()):
        raise TqaiError(f"{partial}: a field of 'moments' is damaged: delete it and calibrate again")
    sums, again = Sums(1, 1, 1), "delete it and calibrate again"
    units = (None, None, 2, len(header["sigmas"]), len(WIDTHS))
    for name, shape in (("error", units), ("damage", units), ("samples", units[3:4])):
        setattr(sums, name, check_tensor(tensors, f"sums/{name}", shape, (torch.float64,), again))
    target.sigmas = tuple(header["sigmas"])
    return moments, sums, header["done"]
