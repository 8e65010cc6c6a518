"""The parts of the pages that say what does not hold: promises that fail, what nothing of ours beats, and which run a figure is of."""

from __future__ import annotations

from typing import Any

from bench.dit_peers import lost_first
from bench.harness import Verdict
from figures import KINDS, e4, load, pick, table

SOLVERS = ("Euler", "UniPC", "DPM++")
# mark -> the benches whose promises the page shows
PROMISES = {
    "steps": ("dit", "default", "levels", "dit_peers"), "codec": ("codec", "stream"), "pipelines": ("stream_report",),
    "llm": ("llm_real", "llm", "llm_speed"),
    "sparse": ("attention",), "sampler": ("sampler",), "calibration": ("calibrate",),
    "methods": ("levels", "attention", "dit_peers", "llm"), "dit-kv": ("dit_kv",), "rolling": ("rolling",),
    "models": ("pipelines",), "few": ("few",), "vllm": ("vllm",),
}  # fmt: skip
COMMANDS = {
    "dit": "dit", "default": "default", "levels": "levels", "dit_peers": "dit --peers", "codec": "codec", "stream": "stream",
    "stream_report": "stream --report", "llm": "llm", "llm_real": "llm --real", "llm_speed": "llm_speed",
    "attention": "attention", "sampler": "sampler", "calibrate": "calibrate",
    "dit_kv": "dit_kv", "rolling": "rolling", "pipelines": "pipelines", "few": "few", "vllm": "vllm",
}  # fmt: skip


WORDS = {  # what a promise is about -> what its failure means
    "step of SmolLM2's shape, float32": (
        "in fp32 reading the weights takes most of a step of so small a model: at 4,096 tokens a step without any attention would only "
        "just be as fast as promised."
    ),
    "step at 16k, torch: times the speed of the fastest dense": (
        "on torch alone (no compiler) a packed step takes more time than dense keys and values that grow in place."
    ),
    "step at 16k, native: times the speed of the fastest dense": (
        "the C kernel is faster than dense keys and values that grow in place, but not by as much as promised of those that are copied."
    ),
    "whole model at 4k, torch": (
        "a whole model with a packed cache on torch alone (no compiler) takes more time per token at 4,096 tokens than DynamicCache."
    ),
    "connector, 3,968 tokens": "the time in which vLLM restores a prefix was not measured by the bench, on a machine that others used too.",
    "tqai 4, in place: time of a step": (
        "inputs that are read in place are projected a few hundred tokens at a time, which takes more time on a CPU than to decode a layer."
    ),
    "tqai 4: times smaller than bf16": (
        "in a model of two layers the rotary positions, which all layers share, take the last part of what inputs save."
    ),
    "flow pipelines taken, more than all peers' functions": (
        "PAB's and FasterCache's hooks fit any attention and save a few layers of a pipeline that tqai leaves exact."
    ),
    "one at a time: minimum of": (
        "a run that lies between two pictures is decided by its first steps: forecasts there leave the worst picture further from its "
        "exact run than the median picture of fewer steps."
    ),
    "4 steps: CPU-time ratio": (
        "with 4 steps, on that mini, no part gives that much with pictures that are as near to real ones and nearer to the exact run than "
        "those of fewer steps."
    ),
    "8 steps: CPU-time ratio": "with 8 steps no part gives that much with pictures as near to real ones and to the exact run.",
    "24 steps: CPU-time ratio": "half the size first gives another picture of the same layout, and that counts against it.",
    "Fréchet distance beside the teacher's": "a student's pictures are further from real ones than its teacher's, by more than promised.",
    "bf16, 8k tokens, d=0.25 with the clusters far": (
        "the clusters are a quarter more keys, and finding them costs time too: half of sol_attn's error and this speed do not go together."
    ),
    "window: order 1 without / order 0 with": (
        "with the nearest blocks, order 0 and a far field have more error than order 1 without one, on the worst seed."
    ),
}


def failing(benches: Any) -> str:
    """The promises of some benches that fail, in a table and in words; what is kept is counted."""
    found = [(name, Verdict(**v)) for name in benches for v in load(name)["verdicts"]]
    missed = [(name, v) for name, v in found if not v.ok]
    commands = "all benches" if benches is COMMANDS else ", ".join(f"`tqai bench {COMMANDS[name]}`" for name in benches)
    if not missed:
        return f"All {len(found)} promises of {commands} are kept."
    rows = [[f"`tqai bench {COMMANDS[name]}`", *v.cells()[:-1]] for name, v in missed]
    count = f"**{len(rows)} of {len(found)} promises fail** ({commands}):"
    lines = dict.fromkeys(line for name, v in missed for line in in_words(name, v))
    return "\n\n".join([count, table(["bench", "mini", "promise that fails", "measured", "needed"], rows), "In words:", "\n".join(lines)])


def in_words(name: str, verdict: Verdict) -> list[str]:
    if name == "dit_peers":
        return beaten(load("dit_peers"))
    return [f"- {words}" for start, words in WORDS.items() if verdict.what.startswith(start)]


def beaten(peers: dict[str, Any]) -> list[str]:
    """What has less error than everything of ours that is as fast, a line a mini."""
    lines = []
    for kind in dict.fromkeys(d["mini"] for d in peers["duels"]):
        missed = [d for d in peers["duels"] if d["mini"] == kind and not d["ok"]]
        groups: dict[str, list[str]] = {}
        for d in missed:
            what = f"{d['setting']} of plain" if d["peer"] in SOLVERS else d["peer"]
            groups.setdefault(what, []).append(d["peer"] if d["peer"] in SOLVERS else f"({d['setting']})")
        names = [f"{what} {', '.join(which)}" for what, which in groups.items()]
        if names:
            lines.append(f"- {kind}: these have less error than every tqai setting that is at least as fast: {'; '.join(names)}.")
    return lines


def parts() -> dict[str, str]:
    out = {f"fails-{page}": failing(benches) for page, benches in PROMISES.items()}
    out["fails-readme"] = failing(COMMANDS)
    return out | {"fails-comfyui": comfyui(load("comfyui")["versions"]), "lost": lost(load("dit_peers")), "balanced": balanced(load("dit"))}


def comfyui(versions: dict[str, Any]) -> str:
    broken = [f"{name} ({version})" for version, found in versions.items() for name, row in found.items() if row["failed"]]
    if broken:
        return f"**Rows that fail**: {'; '.join(broken)}."
    return f"No row of the table below fails ({sum(map(len, versions.values()))} rows, {len(versions)} versions)."


def worse(peers: dict[str, Any]) -> str:
    """What is as fast as ``balanced`` and has no more error."""
    found = [d for d in peers["duels"] if d["default"] == "WORSE"]
    if not found:
        return "No setting of another cache or solver is both as fast as `balanced` and as close to the exact run, on any mini."
    ours = {kind: pick(peers["tables"][kind], peer="tqai", setting="balanced") for kind in peers["tables"]}
    pair = lambda r: [f"{r['cpu']:.2f}", e4(r["nmse"])]  # noqa: E731
    rows = [[d["mini"], d["peer"], d["setting"], *pair(d), *pair(ours[d["mini"]])] for d in found]
    head = ["mini", "cache or solver", "setting", "CPU ratio", "NMSE e-4", "`balanced`: CPU ratio", "NMSE e-4"]
    return f"**These are at least as fast as `balanced` and have no more error:**\n\n{table(head, rows)}"


def lost(peers: dict[str, Any]) -> str:
    rows = []
    for d in lost_first(peers["duels"]):
        if not d["ok"]:
            ours = [d["tqai"], f"{d['tqai_cpu']:.2f}", e4(d["tqai_nmse"])] if d["tqai"] else ["none", "", ""]
            rows.append([d["mini"], d["peer"], d["setting"], f"{d['cpu']:.2f}", e4(d["nmse"]), *ours])
    head = [
        "mini",
        "cache or solver",
        "setting",
        "CPU ratio",
        "NMSE e-4",
        "tqai setting at least as fast, of least error",
        "CPU ratio",
        "NMSE e-4",
    ]
    return table(head, rows)


def counts(samples: dict[str, Any]) -> str:
    """Pictures or clips a run, mini by mini."""
    return " / ".join(str(samples[kind]) for kind in KINDS)


def balanced(dit: dict[str, Any]) -> str:
    """What each page means by the error of ``balanced``."""
    from tqai_core.calibrate.tune import PROOF

    peers, demo, tuned, comfy = load("dit_peers"), load("demo"), load("calibrate"), load("comfyui")
    seeds = lambda result: ", ".join(map(str, result["seeds"]))  # noqa: E731
    errors = [
        (
            "README, first line; this page", "1 / 1 / 1", f"median of 0 to {' / '.join(str(dit['alone'][kind] - 1) for kind in KINDS)}",
            lambda kind: pick(dit["tables"][kind]["alone"], method="tqai balanced")["nmse"],
        ),
        (
            "this page, batches", counts(dit["samples"]), f"median of {seeds(dit)}",
            lambda kind: pick(dit["tables"][kind]["euler"], method="tqai balanced")["nmse"],
        ),
        (
            "README, pictures", counts(demo["count"]), str(demo["seed"]),
            lambda kind: pick(demo["rows"], mini=kind, method="tqai balanced")["nmse"],
        ),
        (
            "[other step caches](methods.md#other-step-caches)", counts(peers["samples"]), f"median of {seeds(peers)}",
            lambda kind: pick(peers["tables"][kind], peer="tqai", setting="balanced")["nmse"],
        ),
        (
            "[tuning](calibration.md), default preset", "8 / 6 / 2", f"mean of {', '.join(map(str, PROOF))}",
            lambda kind: tuned["tables"][kind]["tune"]["proof"]["default"]["error"],
        ),
    ]  # fmt: skip
    rows = [[*where, *(e4(error(kind)) for kind in KINDS)] for *where, error in errors]
    figures_of = next(iter(comfy["versions"].values()))["trained minis: PSNR of balanced, here / by diffusers"]["figures"]
    psnr = {line.split()[0]: line.split(",")[0].split(" ", 1)[1] for line in figures_of}
    rows.append(["[ComfyUI](comfyui.md): PSNR, here / by diffusers", "5 / 5 / 2", "one run", *(psnr[kind] for kind in KINDS)])
    return table(["page", "pictures or clips a run (flux / sd3 / wan)", "seeds", *(f"{kind}, NMSE e-4" for kind in KINDS)], rows)
