"""``tqai try``: does tqai help on this model? The exact run, a few settings in turn, one page and one verdict."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .arguments import number, out_folder, seed, whole
from .errors import TqaiError
from .minis.names import KINDS, UNTUNED

MINIS = (*KINDS, *UNTUNED, "lm")
PIPE_ONLY = ("steps", "guidance", "height", "width", "frames", "psnr")
LM_ONLY = ("max_tokens", "kl")
CLOSE = {"psnr": 30.0, "kl": 0.02}  # what counts as close, unless it is asked for otherwise


def arguments(p: argparse.ArgumentParser) -> None:
    which = f"a folder or hub id of a diffusers pipeline or of a language model, or a mini: {', '.join(MINIS)}"
    p.add_argument("-m", "--model", required=True, help=which)
    p.add_argument("--prompt", help="what the model is asked; minis of pictures: digits, as in 37")
    p.add_argument("--minutes", type=number(0, 10_000), default=10.0, help="after so many no further setting is tried")
    p.add_argument("--out", type=out_folder, default="out/try", help="folder of the page and the pictures")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), default="auto")
    p.add_argument("--device", help="as torch names it: cpu, cuda, cuda:1, mps; left out: a GPU where there is one")
    pipe = p.add_argument_group("pipelines")
    pipe.add_argument("--psnr", type=number(0, 200), help=f"decibels to the exact result that are close enough; default {CLOSE['psnr']:g}")
    pipe.add_argument("--steps", type=whole(1), help="sampler steps; left out: the pipeline's own number, minis 24")
    pipe.add_argument("--guidance", type=number(0))
    for name in ("height", "width", "frames"):
        pipe.add_argument(f"--{name}", type=whole(1))
    lm = p.add_argument_group("language models")
    lm.add_argument("--kl", type=number(0, 100), help=f"mean divergence in nats that is close enough; default {CLOSE['kl']:g}")
    lm.add_argument("--max-tokens", type=whole(2), help="tokens to write; default 128")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The figures. ``args.kind`` is set to ``pipeline`` or ``lm``."""
    from .run import check_library, device_of, is_pipeline

    args.mini = args.model in MINIS and not Path(args.model).is_dir()
    pipe = args.model != "lm" if args.mini else is_pipeline(args.model)
    if foreign := [name for name in (LM_ONLY if pipe else PIPE_ONLY) if getattr(args, name) is not None]:
        asked = ", ".join("--" + name.replace("_", "-") for name in foreign)
        raise TqaiError(f"{asked} asked, but this is a {'diffusers pipeline' if pipe else 'language model'}: leave it out")
    if args.prompt is not None and not args.prompt.strip():
        raise TqaiError("--prompt is empty: give some text, or leave it out")
    check_library("diffusers" if pipe else "transformers")
    for name, default in CLOSE.items():
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    host: Any
    if pipe:
        from .hosts.diffusers import tryout as host
    else:
        from .hosts.transformers import tryout as host
    device = device_of("cpu" if args.mini and args.device is None else args.device)
    return host.run(args, device)


def lines_of(result: dict[str, Any]) -> list[str]:
    """What is printed below the table."""
    return ["", result["verdict"], "", *(f"{name}:\n{text}\n" for name, text in result["paste"]), f"page: {result['page']}"]


def tables_of(result: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    return [(result["title"], *result["table"])]
