"""The packed attention of a few queries in C: ``packed.c``, built once by the system's compiler and loaded by ctypes.

Nothing is built at import. The first decode step on a CPU builds (seconds) or finds the library under
``~/.cache/tqai`` (``TQAI_CACHE`` names another folder), in a file named by the source, the compiler, its options and the
CPU's flags. Before it is trusted its results are compared with torch's. Whatever fails leaves the torch path, and
:func:`status` says why. ``TQAI_NATIVE=0`` switches it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...codecs.rows import BITS
from ...kv.cache import PackedKV, Plan, Segment

if TYPE_CHECKING:
    from ..packed import Part

SOURCE = Path(__file__).with_name("packed.c")
OPTIONS = ("-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TUNE = (("-march=native",), ("-mcpu=native",), ())  # the first one that the compiler takes
ROWS = 32  # queries of one kv head, group included, up to which it beats the torch path
PARALLEL = 1 << 21  # coordinates of keys a thread must have to be worth its start
UNITS = 32


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "group", "count", "d", "dv", "bits_k", "runs")),
        *((name, ctypes.c_void_p) for name in ("level_k", "run", "segments")),
        *((name, ctypes.c_int64) for name in ("segment_count", "first")),
        *((name, ctypes.c_void_p) for name in ("q", "forward", "mean", "scale", "basis")),
        ("axes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("exact_k", "exact_v")),
        *((name, ctypes.c_int64) for name in ("exact", "front", "exact_kind")),
        *((name, ctypes.c_void_p) for name in ("mask",)),
        *((name, ctypes.c_int64) for name in ("mask_kind", "mask_batch", "mask_head", "mask_row", "seen", "after", "precise")),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("top", "weight", "sum", "read")),
        *((name, ctypes.c_int64) for name in ("read_head", "read_block")),
    ]  # fmt: skip


class _Run(ctypes.Structure):
    _fields_ = [("d", ctypes.c_int64), ("bits", ctypes.c_int64), ("level", ctypes.c_void_p), ("back", ctypes.c_void_p)]


class _Segment(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("codes_k", "gain_k", "codes_v", "gain_v")), ("tokens", ctypes.c_int64)]


_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_why = ""  # it does not run, once that was found out
_pool: ThreadPoolExecutor | None = None


def status() -> str:
    """One line for a report: empty while it runs or was not needed yet, else why decoding goes through torch."""
    if off():
        return "native kernel off (TQAI_NATIVE=0): packed attention runs on torch"
    return f"native kernel not used ({_why}): packed attention runs on torch" if _why else ""


def kind() -> str:
    """``avx512``, ``avx2`` or ``plain C`` once the library is loaded, before that an empty string."""
    return _library.tqai_kind().decode() if _library is not None else ""


def off() -> bool:
    return os.environ.get("TQAI_NATIVE", "").strip().lower() in ("0", "off", "false", "no")


def ready() -> bool:
    """Whether the kernel runs here; the first call builds or finds it."""
    global _library, _why
    if off() or _why:
        return False
    if _library is None:
        with _lock:
            if _library is None and not _why:
                try:
                    found = load(build())
                    check(found)
                    _library = found
                except (OSError, RuntimeError, subprocess.SubprocessError, AttributeError) as error:
                    _why = " ".join(str(error).split())[:300]
    return _library is not None


def forget() -> None:
    """Try again at the next call, as a fresh process would."""
    global _library, _why
    _library, _why = None, ""


# -- building


def build(folder: Path | None = None, flags: Sequence[str] = ()) -> Path:
    """The library of this machine, built if the cache has none. ``flags`` are further compiler options.

    Raises RuntimeError or OSError where there is no compiler, or none that works.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    compiler = next((found for name in names if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError(f"no C compiler: looked for {', '.join(names)}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    source = SOURCE.read_bytes()
    parts = [source.decode(), version, *OPTIONS, *flags, platform.machine(), platform.system(), _cpu()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = cache() if folder is None else folder
    path = folder / f"packed-{key}.so"
    if path.is_file():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as there:  # same disk: the finished file appears at once or not at all
        out = Path(there) / "out.so"
        for tune in TUNE:
            command = [compiler, *OPTIONS, *tune, *flags, str(SOURCE), "-o", str(out), "-lm"]
            run = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if run.returncode == 0 and out.is_file():
                os.replace(out, path)
                return path
    raise RuntimeError(f"{compiler} failed: {run.stderr.strip() or f'exit status {run.returncode}'}")


def cache() -> Path:
    """The user's cache folder, made if it is missing; a folder of this process alone where none can be written."""
    named = os.environ.get("TQAI_CACHE")
    try:
        folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqai"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        if named:
            raise
        return Path(tempfile.mkdtemp(prefix="tqai-"))  # never a shared, guessable name


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            lines = f.read().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.tqai_attend.argtypes, library.tqai_attend.restype = [ctypes.POINTER(_Job)], ctypes.c_int
    library.tqai_kind.argtypes, library.tqai_kind.restype = [], ctypes.c_char_p
    return library


def check(library: ctypes.CDLL) -> None:
    """Every size of code against torch on a few made-up rows: a compiler's mistake must not reach a user. RuntimeError."""
    d, h, r, n = 96, 2, 5, 67
    wave = torch.arange(h * n * d, dtype=torch.float32)
    k, v = ((wave * a).sin().view(1, h, n, d) * (wave * b).cos().view(1, h, n, d) for a, b in ((12.9898, 0.37), (78.233, 0.73)))
    q = (wave[: h * r * d] * 3.1).sin().view(1, h, r, d)
    for bits in BITS:
        kv = PackedKV(Plan(bits, bits, sink=2, recent=1, calibrate=0))
        kv.append(k[:, :, :3], v[:, :, :3])
        keys, values = kv.coder_k(), kv.coder_v()
        kv.segments = [Segment(*keys.encode(k), *values.encode(v))]
        kv.length += n
        s = torch.cat([q @ k[:, :, :3].transpose(2, 3), q @ keys.decode(*_tensors(kv.segments[0])[:2]).transpose(2, 3)], 3)
        want = s.softmax(-1) @ torch.cat([v[:, :, :3], values.decode(*_tensors(kv.segments[0])[2:])], 2)
        for precise, limit in ((False, 1e-3), (True, 1e-4)):
            got = _run(library, q, kv, 1, None, 0, None, None, 1, precise)
            error = float("inf") if got is None else float((got[0] / got[1] - want).norm() / want.norm())
            if error < limit:
                continue
            raise RuntimeError(f"its results at {bits} bits differ from torch's by {error:.1e}")


# -- running


def attend(
    q: Tensor, kv: PackedKV, *, count: int, mask: Tensor | None, seen: int, softcap: float | None, aux: Tensor | None, precise: bool,
    part: Part,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """The attention of ``q fp32 [B, H, group x count, D]`` (scaled): weighted sum ``fp32 [B, H, group x count, Dv]``, weight and
    maximum ``[..., 1]``, or None where it cannot.

    ``mask`` broadcasts over ``[B, H x group, count, tokens]``: bool (True = attend) or added. ``seen``: tokens that the first
    query sees, each further one sees one more; 0: all. ``aux [heads]``: logits that take weight and have no value. ``precise``
    keeps products in fp32; else they are of 16-bit integers, which is faster and within the rounding of bf16.
    """
    b, h, r, d = q.shape
    if kv.keys is None or kv.values is None or q.device.type != "cpu" or r > ROWS or d % UNITS or kv.values.shape[3] % UNITS:
        return None
    if mask is not None and mask.shape[-1] < kv.length:
        return None
    if part.added is not None and softcap is not None:  # a mask is added after the cap
        return None
    if not ready():
        return None
    if part.added is not None:
        mask = _with(part.added, mask, kv, count)
    assert _library is not None
    parts = min(torch.get_num_threads(), len(kv.segments), max(b * h * kv.length * d // PARALLEL, 1))
    return _run(_library, q, kv, count, mask, seen, softcap, aux, parts, precise, part.read, part.block)


def _with(added: Tensor, mask: Tensor | None, kv: PackedKV, count: int) -> Tensor:
    """``added [B, H, group x count, packed]`` and a mask as one mask ``fp32 [B, heads, count, tokens]``."""
    b, h, r, n = added.shape
    out = added.new_zeros(b, h * (r // count), count, kv.length)
    out[..., kv.sinks : kv.sinks + n] = added.view(b, -1, count, n)
    if mask is None:
        return out
    mask = mask[..., : kv.length]
    return out.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else out.add_(mask)


def _run(
    library: ctypes.CDLL, q: Tensor, kv: PackedKV, count: int, mask: Tensor | None, seen: int, softcap: float | None,
    aux: Tensor | None, parts: int, precise: bool, read: Tensor | None = None, block: int = 1,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    global _pool
    assert kv.keys is not None
    assert kv.values is not None
    b, h, r, d = q.shape
    keys, values, group = kv.coder_k(), kv.coder_v(), r // count
    exact_k, exact_v = (x.contiguous() if x.dtype in (torch.bfloat16, torch.float32) else x.float() for x in (kv.keys, kv.values))
    strides: Sequence[int] = (0, 0, 0)
    if mask is not None:
        if mask.dtype not in (torch.bool, torch.float32):
            mask = mask.float()
        if mask.stride(-1) != 1:
            mask = mask.contiguous()
        strides = [0 if size == 1 else step for size, step in zip(mask.shape[:3], mask.stride()[:3], strict=True)]
    q = q.contiguous()
    mean, scale = (None if x is None else x.contiguous() for x in (kv.mean, kv.scale))
    basis = values.basis
    runs = (_Run * len(values.runs))(*((run.d, run.bits, run.level.data_ptr(), run.back.data_ptr()) for run in values.runs))
    read = None if read is None else read.contiguous()
    states, jobs, at = [], [], 0
    for i in range(parts):
        own = kv.segments[len(kv.segments) * i // parts : len(kv.segments) * (i + 1) // parts]
        table = (_Segment * len(own))(*((*(t.data_ptr() for t in _tensors(segment)), len(segment)) for segment in own))
        top, weight = q.new_full((b, h, r), -1e30), q.new_zeros(b, h, r)
        if aux is not None and i == 0:
            top.view(b, h, group, count).copy_(aux.view(h, group, 1))
            weight.fill_(1)
        state = (top, weight, q.new_empty(b, h, r, values.d))
        states.append(state)
        jobs.append(_Job(
            b * h, h, group, count, d, values.d, keys.bits, len(runs),
            keys.level.data_ptr(), ctypes.addressof(runs), ctypes.addressof(table), len(own), kv.sinks + at,
            q.data_ptr(), keys.forward.data_ptr(), *(None if x is None else x.data_ptr() for x in (mean, scale, basis)),
            0 if basis is None else basis.shape[1], exact_k.data_ptr(), exact_v.data_ptr(),
            *((exact_k.shape[2], kv.sinks) if i == 0 else (0, 0)), 1 if exact_k.dtype == torch.bfloat16 else 2,
            None if mask is None else mask.data_ptr(), 0 if mask is None else 1 if mask.dtype == torch.bool else 2,
            *strides, seen, kv.sinks + kv.packed, precise, softcap or 0.0, *(x.data_ptr() for x in state),
            None if read is None else read.data_ptr() + at // block, 0 if read is None else read.shape[2], block,
        ))  # fmt: skip
        jobs[-1].table = table  # kept alive
        at += sum(map(len, own))
    if parts == 1:
        done = [library.tqai_attend(ctypes.byref(jobs[0]))]
    else:  # neighbouring segments to a thread each (split K)
        if _pool is None:
            _pool = ThreadPoolExecutor(torch.get_num_threads(), "tqai-packed")
        done = list(_pool.map(lambda job: library.tqai_attend(ctypes.byref(job)), jobs))
    if any(done):
        return None
    top, weight, total = states[0]
    for t, w, x in states[1:]:
        high = torch.maximum(top, t)
        mine, theirs = torch.exp(top - high), torch.exp(t - high)
        top, weight = high, weight * mine + w * theirs
        total = total * mine[..., None] + x * theirs[..., None]
    return total, weight[..., None], top[..., None]


def _tensors(segment: Segment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return segment.codes_k, segment.gain_k, segment.codes_v, segment.gain_v
