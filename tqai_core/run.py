"""``tqai run``: one prompt through a language model or a diffusers pipeline, then what tqai saved, cost and changed."""

from __future__ import annotations

import argparse
import sys
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import number, out_folder, text_in, whole
from .errors import TqaiError
from .registry import ROLES, parse
from .text import MAX_TOKENS, first_line

if TYPE_CHECKING:
    import torch

    from .config import Config

DTYPES = ("auto", "float32", "float16", "bfloat16")
CACHE_OPTIONS = ("sink", "recent", "protect", "calibrate")
LM_ONLY = ("bits_k", "bits_v", *CACHE_OPTIONS, "max_tokens", "temperature", "chat", "system", "then")
DEMO_TOKENS = 4096  # of the mini's own prompt: packing pays there
PIPE_ONLY = ("level", "steps", "guidance", "negative", "height", "width", "frames", "video", "out")


def arguments(p: argparse.ArgumentParser) -> None:
    asked = (
        "what the model is asked: text, @FILE, or - for standard input; left out: turns are typed in the terminal, and --demo has its own"
    )
    p.add_argument("prompt", nargs="?", help=asked)
    which = p.add_mutually_exclusive_group(required=True)
    places = "a hub id, or a local folder: of a causal LM, or of a diffusers pipeline (model_index.json); or a GGUF file, or its folder"
    which.add_argument("-m", "--model", help=places)
    which.add_argument("--demo", action="store_true", help="the trained byte-level mini: writes what looks like Python")
    for role in ROLES:
        p.add_argument(f"--{role}", metavar="SPEC", help=f"{role}: a name, name:key=value,..., or none (see `tqai methods`)")
    p.add_argument("--skip-layers", metavar="LAYERS", help="blocks that stay exact, as in 0,1,-1 or 2-4")
    p.add_argument("--pipeline", metavar="FILE", help="the stages from JSON: a file, or the text itself; options above win over it")
    p.add_argument("--seed", type=whole(0, 2**64 - 1), default=0)
    p.add_argument("--dtype", choices=DTYPES, default="auto")
    p.add_argument("--device", help="as torch names it: cpu, cuda, cuda:1, mps; left out: a GPU where there is one")
    p.add_argument("--compare", action="store_true", help="run the exact model too, and say what differs")
    lm = p.add_argument_group("language models")
    lm.add_argument("--bits-k", type=int, help="bits of keys: 2, 3, 4 or 8")
    lm.add_argument("--bits-v", type=int, help="bits of values")
    lm.add_argument("--sink", type=int, help="first tokens that stay exact")
    lm.add_argument("--recent", type=int, help="last tokens that stay exact")
    lm.add_argument("--protect", type=int, help="first and last layers at 8 bits, at most an eighth of all each")
    lm.add_argument("--calibrate", type=int, help="tokens waited for before keys are scaled and packed; 0: never scaled, packed at once")
    lm.add_argument(
        "--max-tokens", type=whole(1), help=f"most tokens to write; default {MAX_TOKENS['model']}, with --demo {MAX_TOKENS['demo']}"
    )
    lm.add_argument(
        "--temperature",
        type=number(0, what="0 (greedy) or a temperature"),
        help="0 is greedy; left out: what the model's own settings say, with --demo .8",
    )
    lm.add_argument("--chat", action=argparse.BooleanOptionalAction, help="the tokenizer's chat template; left out: where it has one")
    lm.add_argument(
        "--raw", dest="chat", action="store_const", const=False, help="the prompt as it is, as --no-chat: the model continues it"
    )
    lm.add_argument("--system", metavar="TEXT", help="what the model is told before the first turn")
    lm.add_argument("--then", action="append", metavar="TEXT", help="a further turn on the same cache; may be given several times")
    pipe = p.add_argument_group("diffusers pipelines (without stages: the balanced preset of the family)")
    pipe.add_argument("--level", choices=("model", "block", "attention"), help="where the stages act; left out: model")
    pipe.add_argument("--steps", type=whole(1), help="sampler steps; left out: the pipeline's own number, as for those below")
    pipe.add_argument("--guidance", type=number(0))
    pipe.add_argument("--negative", metavar="PROMPT")
    pipe.add_argument("--height", type=whole(1))
    pipe.add_argument("--width", type=whole(1))
    pipe.add_argument("--frames", type=whole(1))
    pipe.add_argument("--video", choices=("auto", "mp4", "gif", "webp"), help="auto: mp4 where imageio has ffmpeg, else gif")
    pipe.add_argument("--out", type=out_folder, help="folder of the pictures or the video; left out: out/run")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The figures. TqaiError for what cannot be run, before anything large is loaded where that can be known."""
    import torch

    pipe = not args.demo and is_pipeline(args.model)
    args.prompt = _prompt(args, pipe)
    if args.compare and (args.then or args.prompt is None):
        raise TqaiError("--compare asked, but it is about one turn: give one prompt and leave --then out")
    if foreign := [name for name in (LM_ONLY if pipe else PIPE_ONLY) if getattr(args, name) is not None]:
        asked = ", ".join("--" + name.replace("_", "-") for name in foreign)
        raise TqaiError(f"{asked} asked, but this is a {'diffusers pipeline' if pipe else 'language model'}: leave it out")
    check_library("diffusers" if pipe else "transformers")
    config = config_of(args, "model" if pipe else "kv")
    device = device_of(args.device)
    args.out = out_folder("out/run") if args.out is None and pipe else args.out
    host: Any
    if pipe:
        from .hosts.diffusers import run as host
    else:
        from .hosts.transformers import run as host
    try:
        return host.run(args, config, device)
    except torch.OutOfMemoryError as error:
        raise TqaiError(f"out of memory ({first_line(error)}): take a smaller --dtype, fewer tokens or pixels, or --device cpu") from None


def check_library(name: str) -> None:
    if util.find_spec(name) is None:
        raise TqaiError(f"{name} is not installed: pip install 'tqai-core[{name}]'")


def _prompt(args: argparse.Namespace, pipe: bool) -> str | None:
    """The text that is asked for; None where turns are typed."""
    given = args.prompt
    if given is None and args.demo:
        from .minis import lm_text

        return bytes(lm_text()[:DEMO_TOKENS].tolist()).decode("ascii", "replace")
    if given is None:
        if pipe or args.then or not sys.stdin.isatty():
            raise TqaiError("the prompt is missing: give some text, @FILE, or - for standard input")
        return None
    if given == "-":
        given = sys.stdin.read()
    elif given.startswith("@"):
        given = given[1:] if given.startswith("@@") else text_in(given[1:])
    if not given.strip() or any(not words.strip() for words in args.then or ()):
        raise TqaiError("the prompt is empty: give some text, as in `tqai run 'Once upon' -m MODEL`")
    return given


def config_of(args: argparse.Namespace, level: str) -> Config | None:
    """The pipeline that the options describe; None for a diffusers pipeline without any, which has its family's preset."""
    from .config import Config

    data = _pipeline(args.pipeline) if args.pipeline else {}
    was = data.setdefault("level", args.level or level)
    if (was == "kv") != (level == "kv"):
        thing = "a language model (level 'kv')" if level == "kv" else "a diffusers pipeline (level 'model', 'block' or 'attention')"
        raise TqaiError(f"--pipeline has level {was!r}, but MODEL is {thing}: take 'level' out of it, or give another MODEL")
    data["level"] = args.level or was
    for role in ROLES:
        if (spec := getattr(args, role)) is not None:
            data[role] = spec
            data.pop(f"{role}_kwargs", None)
    if bits := {name: given for name in ("bits_k", "bits_v") if (given := getattr(args, name)) is not None}:
        given = data.get("codec") or "turbo"
        name, options = parse("turbo" if given == "default" else given)
        data["codec"] = {"name": name, **options, **bits}
    data |= {name: given for name in (*CACHE_OPTIONS, "skip_layers") if (given := getattr(args, name)) is not None}
    if level != "kv" and not data.keys() - {"level"} and data["level"] == "model":
        return None
    return Config.from_dict(data)


def _pipeline(given: str) -> dict[str, Any]:
    from .config import AGAIN
    from .files import parse_json, read_text

    text = given
    if not given.lstrip().startswith("{"):
        text = read_text(given, what="pipeline", again="give --pipeline a JSON file, or its text")
    data = parse_json(text, what=f"pipeline {given[:60]}", again=AGAIN)
    if not isinstance(data, dict):
        raise TqaiError(f'--pipeline {given}: a {type(data).__name__}, expected an object such as {{"strategy": "delta2"}}')
    return data


def is_pipeline(model: str) -> bool:
    """Whether it is a diffusers pipeline, as a folder or on the hub. TqaiError for a path that is none, which no hub is asked for."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if (folder / "model_index.json").exists():
            return True
        if not (folder / "config.json").exists() and not any(folder.glob("*.gguf")):
            raise TqaiError(
                f"{model} has neither config.json (a language model) nor model_index.json (a diffusers pipeline), and no GGUF file"
            )
        return False
    if folder.is_file() and folder.suffix.lower() == ".gguf":
        return False
    if folder.exists():
        raise TqaiError(f"{model} is a file: give the folder that holds config.json or model_index.json")
    if model.count("/") > 1 or model.startswith((".", "/", "~")) or "\\" in model or not model.strip():
        raise TqaiError(f"no such folder: {model!r}; give an existing one, a hub id such as 'Qwen/Qwen3-0.6B', or --demo")
    return _is_pipeline_on_hub(model)


def _is_pipeline_on_hub(name: str) -> bool:
    """Asks for a file of some kilobytes that pipelines alone have. What cannot be reached is for the loading code to tell of."""
    if util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import errors, hf_hub_download

    try:
        hf_hub_download(name, "model_index.json")
    except (OSError, ValueError, errors.EntryNotFoundError):
        return False
    return True


def device_of(name: str | None) -> torch.device:
    """The device of ``--device``, once it has given back a number."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TqaiError(f"--device {name}: {first_line(error)}; this torch ({torch.__version__}) can always use cpu") from None
    return device


def lines_of(result: dict[str, Any]) -> list[str]:
    """The figures for a terminal."""
    return [*(_lm_lines if result["kind"] == "lm" else _pipe_lines)(result), *(f"warning: {text}" for text in result["warnings"])]


def _peak(run: dict[str, Any]) -> str:
    peak = run["peak"]
    return "peak memory " + (f"{peak['bytes'] / 2**20:.1f} MiB: " if peak["bytes"] is not None else "") + peak["how"]


def _speed(run: dict[str, Any], where: str) -> str:
    speed = f"{run['tokens_per_second']:.1f} tokens/s on {where}" if run["tokens_per_second"] else "too few tokens for a speed"
    again = f", {run['prompt_tokens'] - run['tokens_read']} of them held from the turns before" * (
        run["tokens_read"] < run["prompt_tokens"]
    )
    return f"{run['new_tokens']} tokens, {speed} after {run['seconds_prefill']:.2f} s for the prompt's {run['prompt_tokens']}{again}"


def _held(cache: dict[str, Any]) -> str:
    """Bytes of the cache, beside those of 16 bits a number."""
    held, plain, tokens = cache["bytes_held"], cache["bytes_16bit"], f"{cache['tokens']:,} tokens"
    left = "" if cache["positions_left"] is None else f"; {cache['positions_left']:,} of {cache['positions']:,} tokens are left"
    if not cache["tokens_packed"]:
        return f"cache {held:,} B for {tokens}: all of them exact{left}"
    start = (
        f"cache {held:,} B for {tokens}, {cache['tokens_packed']:,} of them packed, most ever held {cache['bytes_peak']:,} B; at 16 bits "
    )
    if held >= plain:
        return f"{start}{plain:,} B: so short a text is no smaller, for its exact tokens weigh more than the packed ones save{left}"
    return f"{start}{plain:,} B, {plain / held:.2f}x as large{left}"


def _against(run: dict[str, Any], exact: dict[str, Any], where: str, pays: int) -> list[str]:
    """What packing did to the speed of this very text."""
    mine, other, tokens = run["tokens_per_second"], exact["tokens_per_second"], run["cache"]["tokens"]
    if not mine or not other:
        return []
    told = f"{mine / other:.2f}x the speed of the exact run at {tokens:,} tokens on {where}"
    return [told if mine >= other else f"{told}; it pays from some {pays:,} tokens on"]


def _lm_lines(result: dict[str, Any]) -> list[str]:
    where = result["processor"]
    lines = [_speed(result, where), _held(result["cache"]), _peak(result)]
    if (other := result.get("compare")) is None:
        return lines
    same = other["first_difference"] is None
    kl = "not a number" if other["kl_mean"] is None else f"mean {other['kl_mean']:.6f}, largest {other['kl_max']:.6f} nats"
    return [
        *lines,
        "",
        "exact run: " + _speed(other, where),
        f"cache {other['cache']['bytes_held']:,} B",
        _peak(other),
        *_against(result, other, where, result["cache"]["pays_from"]),
        "tokens identical" if same else f"first difference at token {other['first_difference']} of {other['new_tokens']}",
        f"KL of the next token along the exact run: {kl}",
        *([] if same else ["", "the exact run wrote:", other["text"]]),
    ]


def _pipe_lines(result: dict[str, Any]) -> list[str]:
    report = result["report"]
    share = report["calls_skipped"] / report["calls"] if report["calls"] else 0.0
    lines = [
        f"{report['calls_skipped']} of {report['calls']} model calls skipped ({share:.0%}) in {report['evaluations']} steps, "
        f"{result['seconds']:.2f} s; {report['bytes_held_peak']:,} B held at most",
        _peak(result),
        f"saved {', '.join(result['files'])}",
    ]
    if (other := result.get("compare")) is None:
        return lines
    figures = f"PSNR {other['psnr']:.1f} dB, SSIM {other['ssim']:.4f}, largest error {other['largest']:.2%} of the range"
    close = "identical" if other["identical"] else figures
    if not other["identical"] and other["psnr_latents"] is not None:
        close += f", of the latents {other['psnr_latents']:.1f} dB"
    return [
        *lines,
        "",
        f"exact run: {other['seconds']:.2f} s, {other['seconds'] / result['seconds']:.2f}x as long; to it: {close}",
        _peak(other),
        f"saved {', '.join(other['files'])}",
        f"both, their difference and every decision: {other['page']}",
    ]
