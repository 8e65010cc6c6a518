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

import torch
from torch import Tensor

from ..codecs.rows import BITS, Rows, rows
from ..kv import Segment

SOURCE = Path(__file__).with_name("packed.c")
OPTIONS = ("-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TUNE = (("-march=native",), ("-mcpu=native",), ())  # the first one that the compiler takes
ROWS = 32  # queries of one kv head, group included, up to which it beats the torch path
PARALLEL = 1 << 21  # coordinates of keys a thread must have to be worth its start
UNITS = 32


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "group", "count", "d", "dv", "bits_k", "bits_v")),
        ("level_k", ctypes.c_void_p), ("level_v", ctypes.c_void_p),
        ("segments", ctypes.c_void_p), ("segment_count", ctypes.c_int64),
        ("q", ctypes.c_void_p), ("shift", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        *((f"mask_{name}", ctypes.c_int64) for name in ("kind", "batch", "head", "row")),
        ("softcap", ctypes.c_float),
        ("top", ctypes.c_void_p), ("weight", ctypes.c_void_p), ("sum", ctypes.c_void_p),
    ]  # fmt: skip


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
            run = subprocess.run(command, capture_output=True, text=True, timeout=120)
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
    q = (wave[: h * r * d] * 3.1).sin().view(h, r, d)
    for bits in BITS:
        keys, values = rows(d, bits, 0, k.device), rows(d, bits, 1, k.device)
        segment = Segment(*keys.encode(k), *values.encode(v))
        s = q @ (keys.lookup(segment.codes_k) * segment.gain_k.float()[..., None])[0].transpose(1, 2)
        want = s.softmax(-1) @ (values.lookup(segment.codes_v) * segment.gain_v.float()[..., None])[0]
        top, weight, total = q.new_full((h, r, 1), -1e30), q.new_zeros(h, r, 1), q.new_zeros(h, r, d)
        _call(library, [segment], q, None, keys, values, 1, r, h, None, (0, 0, 0), 0, None, top, weight, total)
        error = float((total / weight - want).norm() / want.norm())
        if not error < 1e-3:
            raise RuntimeError(f"its results at {bits} bits differ from torch's by {error:.1e}")


# -- running


def attend(
    segments: Sequence[Segment], q: Tensor, shift: Tensor | None, keys: Rows, values: Rows, *, count: int, mask: Tensor | None,
    first: int, softcap: float | None, top: Tensor, weight: Tensor, total: Tensor,
) -> bool:  # fmt: skip
    """Adds ``segments`` to an online softmax; False, with nothing changed, where it cannot.

    ``q fp32 [B, H, group x count, D]``: rotated and scaled. ``shift [B, H, group x count, 1]`` is added to the scores.
    ``mask`` broadcasts over ``[B, H x group, count, tokens]``, the first packed token at column ``first``: bool (True = attend)
    or added. ``top``, ``weight`` (``[B, H, group x count, 1]``) and ``total`` (``[B, H, group x count, Dv]``, rotated) are
    fp32, contiguous and changed in place.
    """
    b, h, r, d = q.shape
    n = sum(map(len, segments))
    if q.device.type != "cpu" or r > ROWS or d % UNITS or values.d % UNITS or not n or not ready():
        return False
    if torch.is_grad_enabled() and q.requires_grad:  # torch's own operations keep the graph
        return False
    assert _library is not None
    strides = (0, 0, 0)
    if mask is not None:
        if mask.shape[-1] < first + n:
            return False
        if mask.dtype not in (torch.bool, torch.float32):
            mask = mask.float()
        if mask.stride(-1) != 1:
            mask = mask.contiguous()
        strides = tuple(0 if size == 1 else step for size, step in zip(mask.shape[:3], mask.stride()[:3], strict=True))  # type: ignore[assignment]
    for segment in segments:
        if not all(tensor.is_contiguous() for tensor in vars(segment).values()):
            return False
    q = q.contiguous()
    shift = None if shift is None else shift.contiguous()
    common = (keys, values, r // count, count, h, mask, strides)
    parts = min(torch.get_num_threads(), len(segments), max(b * h * n * d // PARALLEL, 1))
    if parts == 1:
        return _call(_library, segments, q, shift, *common, first, softcap, top, weight, total)
    return _parallel(_library, segments, q, shift, common, first, softcap, top, weight, total, parts)


def _parallel(library, segments, q, shift, common, first, softcap, top, weight, total, parts) -> bool:  # type: ignore[no-untyped-def]
    """Neighbouring segments to a thread each (split K), and the parts' softmaxes joined."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(torch.get_num_threads(), "tqai-packed")
    jobs, at = [], 0
    for i in range(parts):
        own = segments[len(segments) * i // parts : len(segments) * (i + 1) // parts]
        state = (torch.full_like(top, -1e30), torch.zeros_like(weight), torch.zeros_like(total))
        jobs.append((state, _pool.submit(_call, library, own, q, shift, *common, first + at, softcap, *state)))
        at += sum(map(len, own))
    done = [future.result() for _, future in jobs]
    if not all(done):
        return False
    for (t, w, s), _ in jobs:
        high = torch.maximum(top, t)
        mine, theirs = torch.exp(top - high), torch.exp(t - high)
        weight.mul_(mine).add_(w * theirs)
        total.mul_(mine).add_(s * theirs)
        top.copy_(high)
    return True


def _call(library, segments, q, shift, keys, values, group, count, h, mask, strides, first, softcap, top, weight, total) -> bool:  # type: ignore[no-untyped-def]
    table = (_Segment * len(segments))()
    for entry, segment in zip(table, segments, strict=True):
        entry.codes_k, entry.gain_k = segment.codes_k.data_ptr(), segment.gain_k.data_ptr()
        entry.codes_v, entry.gain_v = segment.codes_v.data_ptr(), segment.gain_v.data_ptr()
        entry.tokens = len(segment)
    job = _Job(
        q.numel() // (group * count * keys.d), h, group, count, keys.d, values.d, keys.bits, values.bits,
        keys.level.data_ptr(), values.level.data_ptr(), ctypes.addressof(table), len(segments),
        q.data_ptr(), None if shift is None else shift.data_ptr(),
        None if mask is None else mask.data_ptr() + first * mask.element_size(),
        0 if mask is None else 1 if mask.dtype == torch.bool else 2, *strides, softcap or 0.0,
        top.data_ptr(), weight.data_ptr(), total.data_ptr(),
    )  # fmt: skip
    return library.tqai_attend(ctypes.byref(job)) == 0
