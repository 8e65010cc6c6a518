"""The packed attention of a few queries in C: ``packed.c``, built once by the system's compiler and loaded by ctypes.

Nothing is built at import. The first decode step on a CPU builds (seconds) or finds the library under
``~/.cache/tqai`` (``TQAI_CACHE`` names another folder), in a file named by a hash of the source, the compiler, its options and
the CPU's flags, and by a hash of its own content. A library runs as code of the user: it is loaded only from a folder and a
file that nobody else can write, and only if its content has the hash of its name. Then its results are compared with torch's.
Whatever fails leaves the torch path, and :func:`status` says why. ``TQAI_NATIVE=0`` switches it off; a cache looks at it when it packs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...codecs.rows import BITS, rows
from ...kv.segments import UNCHANGED, Adjustment, BitTier, encode, rows_in
from ..call import Call, OnlineSoftmax

if TYPE_CHECKING:
    from ...kv.cache import PackedKV

SOURCE = Path(__file__).with_name("packed.c")
OPTIONS = ("-O3", "-std=c11", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC") + (
    ("-pthread",) if os.name == "posix" else ()
)
TUNE = (("-march=native",), ("-mcpu=native",), ())  # the first one that the compiler takes
ROWS = 32  # queries of one kv head, group included, up to which it beats the torch path
PARALLEL = 3 << 17  # coordinates of keys a thread must have to be worth its start: 4,096 tokens of 3 heads of 64 for two of them
THREADS = 64
UNITS = 32
KINDS = {torch.bfloat16: 1, torch.float32: 2}

_lock = threading.Lock()
_library: ctypes.CDLL | None = None
_why = ""  # it does not run, once that was found out


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


# -- building


def build(folder: Path | None = None, flags: Sequence[str] = ()) -> Path:
    """The library of this machine, built if the cache has none. ``flags`` are further compiler options.

    Raises RuntimeError or OSError where there is no compiler, or none that works.
    """
    command = compiler()
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60).stdout
    source = SOURCE.read_bytes()
    parts = [source.decode(), version, *command, *OPTIONS, *flags, platform.machine(), platform.system(), _cpu()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    folder = cache() if folder is None else folder
    _check_private(folder)
    if found := sorted(folder.glob(f"packed-{key}-*.so")):
        return found[0]
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as there:  # the same disk: the finished file appears at once
        out = Path(there) / "out.so"
        for tune in TUNE:
            run = subprocess.run(
                [*command, *OPTIONS, *tune, *flags, str(SOURCE), "-o", str(out), "-lm"], capture_output=True, text=True, timeout=300
            )
            if run.returncode == 0 and out.is_file():
                with open(out, "rb+") as f:
                    os.fsync(f.fileno())  # a power cut must not leave the name without the content
                    path = folder / f"packed-{key}-{_hash(f.read())}.so"
                os.chmod(out, 0o700)
                os.replace(out, path)
                return path
    raise RuntimeError(f"{shlex.join(command)} failed: {run.stderr.strip() or f'exit status {run.returncode}'}")


def compiler() -> list[str]:
    """The words of the command that compiles: those of ``CC``, or the first of cc, gcc and clang that is here."""
    asked = os.environ.get("CC", "")
    try:
        commands = [shlex.split(asked, posix=os.name == "posix")] if asked.strip() else [["cc"], ["gcc"], ["clang"]]
    except ValueError as error:
        raise RuntimeError(f"CC={asked!r} is no command ({error})") from None
    for name, *options in commands:
        if path := shutil.which(name):
            return [path, *options]
    raise RuntimeError(f"no C compiler: looked for {', '.join(words[0] for words in commands)}")


def cache() -> Path:
    """The user's cache folder, made if it is missing; where there is none to write to, one folder a user among temporary files."""
    named = os.environ.get("TQAI_CACHE")
    try:
        folder = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqai"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):
        if named:
            raise
        user = os.getuid() if hasattr(os, "getuid") else "user"
        folder = Path(tempfile.gettempdir()) / f"tqai-{user}"  # anybody can guess the name: _check_private says whether it is ours
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder


def _check_private(folder: Path) -> None:
    """RuntimeError unless ``folder`` is one that nobody but this user and root can write to, replace, or lead elsewhere."""
    cure = "make it yours alone (chmod 700), or set TQAI_CACHE to a folder that is"
    if stat.S_ISLNK(os.lstat(folder).st_mode):
        raise RuntimeError(f"cache folder {folder} is a symbolic link: set TQAI_CACHE to the folder itself")
    if why := _others(os.lstat(folder)):
        raise RuntimeError(f"cache folder {folder} {why}: {cure}")
    for parent in folder.resolve().parents:
        if why := _others(parent.stat(), parent=True):
            raise RuntimeError(f"cache folder {folder}: {parent} above it {why}: {cure}")


def _others(found: os.stat_result, parent: bool = False) -> str:
    """How somebody else could write here, or "". Who owns a parent can swap what is in it; a sticky one protects it."""
    if os.name != "posix":  # no owners and modes; the folders of a user are closed to others there
        return ""
    if found.st_uid != os.geteuid() and not (parent and found.st_uid == 0):
        return f"belongs to user {found.st_uid}"
    sticky = parent and found.st_mode & stat.S_ISVTX
    return "can be written by others" if found.st_mode & 0o022 and not sticky else ""


def _check_library(path: Path) -> None:
    """RuntimeError for a link, another user's file, or content that has not the hash of its name."""
    cure = "delete it, and it is built again"
    if not stat.S_ISREG((found := os.lstat(path)).st_mode):
        raise RuntimeError(f"library {path} is a symbolic link or no file: {cure}")
    if why := _others(found):
        raise RuntimeError(f"library {path} {why}: {cure}")
    with open(path, "rb") as f:  # nobody else can swap it in a folder that _check_private passed
        if _hash(f.read()) != path.stem.rpartition("-")[2]:
            raise RuntimeError(f"library {path} was changed or cut off after it was built: {cure}")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            lines = f.read().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def load(path: Path) -> ctypes.CDLL:
    """The library of :func:`build`, checked before the system maps it: a truncated one would end the process."""
    _check_private(path.parent)
    _check_library(path)
    library = ctypes.CDLL(str(path))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.tqai_attend.argtypes = [pointer, number, *[pointer] * 4, number, number, ctypes.c_float, ctypes.c_float, pointer]
    library.tqai_attend.restype = ctypes.c_int
    library.tqai_kind.argtypes, library.tqai_kind.restype = [], ctypes.c_char_p
    return library


def check(library: ctypes.CDLL) -> None:
    """Every size of code against torch on a few made-up rows: a compiler's mistake must not reach a user. RuntimeError."""
    d, h, r, n, cpu = 96, 2, 5, 67, torch.device("cpu")
    wave = torch.arange(h * n * d, dtype=torch.float32)
    k, v = ((wave * a).sin().view(1, h, n, d) * (wave * b).cos().view(1, h, n, d) for a, b in ((12.9898, 0.37), (78.233, 0.73)))
    q = (wave[: h * r * d] * 3.1).sin().view(1, h, r, d)
    for bits in BITS:
        keys, values = rows(d, bits, 0, cpu), rows(d, bits, 1, cpu)
        segment, _ = encode(k, v, keys, values)
        tier = BitTier(k[:, :, :3], v[:, :, :3], [segment], keys, values, None, None, sinks=2, packed=n)
        s = torch.cat([q @ k[:, :, :3].mT, q @ keys.decode(segment.codes_k, segment.gain_k).mT], 3)
        want = s.softmax(-1) @ torch.cat([v[:, :, :3], values.decode(segment.codes_v, segment.gain_v)], 2)
        for precise, limit in ((False, 1e-3), (True, 1e-4)):
            got = run(Call(q, 1, precise=precise), tier, UNCHANGED, library)
            error = float("inf") if got is None else float((got.result() - want).norm() / want.norm())
            if not error < limit:
                raise RuntimeError(f"its results at {bits} bits differ from torch's by {error:.1e}")


# -- running


def takes(call: Call, tier: BitTier, change: Adjustment) -> str:
    """Why the kernel cannot run ``call``, or ""; the first call that it could run builds it."""
    q = call.q
    if not tier.segments:
        return "nothing is packed"
    if q.device.type != "cpu" or q.shape[2] > ROWS:
        return f"it is for a CPU and at most {ROWS} queries of a kv head"
    if q.shape[3] % UNITS or tier.values.shape[3] % UNITS:
        return f"head dimensions must be multiples of {UNITS}"
    if call.mask.given is not None and call.mask.given.shape[-1] < tier.length:
        return "the mask has fewer columns than there are tokens"
    if change.offsets is not None and call.softcap is not None:
        return "offsets come before the cap, a mask after it"
    return "" if ready() else status()


def whole(query: Tensor, kv: PackedKV, scaling: float, mask: Tensor | None, softcap: float | None, aux: Tensor | None) -> Tensor | None:
    """The attention of all of a cache whose tokens lie in one tier that nothing adjusts: ``[B, heads, Q, Dv]`` in the query's dtype, or
    None where the kernel cannot. ``mask`` is over the rows. The rows are prepared once, until more are packed, and so is a call like
    the one before."""
    held, threads, (b, heads, count, d) = kv.prepared, torch.get_num_threads(), query.shape
    if held is None or held.threads != threads:
        if not (query.is_cpu and kv.segments and ready()) or kv.fine or kv.policy.by_block:
            return None
        held = kv.prepared = Prepared(kv.tiers()[0], threads)
    group = heads // held.h
    if b != held.b or group * held.h != heads or group * count > ROWS or d != held.d or (d | held.dv) % UNITS:
        return None
    if mask is not None and mask.shape[3] < kv.length:
        return None
    q, k, v = _whole(query), _whole(kv.keys), _whole(kv.values)
    like, asked = (heads, count, query.dtype, k.dtype), held.asked
    if mask is not None or aux is not None or held.like != like:
        asked = _asked(q, k, group, count, query.dtype == torch.float32, KINDS[q.dtype], mask, aux)
        if mask is None and aux is None:
            held.like, held.asked = like, asked
    out = q.new_empty(b, count, heads, held.dv)
    seen = kv.length - count + 1 if mask is None and count > 1 else 0
    if not _run(held, asked, q, k, v, seen, scaling, softcap, out.data_ptr()):
        return None
    out = out.view(b, heads, 1, held.dv) if count == 1 else out.transpose(1, 2)
    return out if out.dtype == query.dtype else out.to(query.dtype)


def run(call: Call, tier: BitTier, change: Adjustment, library: ctypes.CDLL | None = None) -> OnlineSoftmax | None:
    """The softmax over all rows of ``tier``, exact ones included, or None where the kernel fails."""
    held = Prepared(tier, torch.get_num_threads())
    q, k, v = _whole(call.q), _whole(tier.keys), _whole(tier.values)
    state, read = OnlineSoftmax(*(q.new_empty(*q.shape[:3], n) for n in (1, 1, held.dv))), change.read
    mask = call.mask.given if change.offsets is None else _with(change.offsets, call, tier)
    asked = _asked(q, k, call.group, call.count, call.precise, 0, mask, call.aux, state, read, change.block)
    return state if _run(held, asked, q, k, v, call.mask.first, 1.0, call.softcap, None, library) else None


def _with(offsets: Tensor, call: Call, tier: BitTier) -> Tensor:
    """Offsets of the packed rows and the mask as one mask ``fp32 [B, heads, count, tokens]``."""
    b, n, mask = offsets.shape[0], offsets.shape[3], call.mask.given
    out = offsets.new_zeros(b, offsets.shape[1] * call.group, call.count, tier.length)
    out[..., tier.sinks : tier.sinks + n] = offsets.view(b, -1, call.count, n)
    if mask is None:
        return out
    mask = mask[..., : tier.length]
    return out.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else out.add_(mask)


class Prepared:
    """The packed rows of a tier as ``Rows`` of the kernel: neighbouring segments to a thread each (split K), where it is worth its start.
    All tables are of int64."""

    def __init__(self, tier: BitTier, threads: int) -> None:
        (self.b, self.h, _, self.d), self.dv, self.threads = tier.keys.shape, tier.values.shape[3], threads
        self.like: Any = None  # the last call that had neither mask nor aux
        self.asked: list[Tensor] = []
        keys, values = tier.coder_k, tier.coder_v
        kept = self._kept = [torch.tensor(())]  # alive as long as pointers to it

        def at(x: Tensor | None) -> int:
            if x is not None:
                kept.append(x.contiguous())
            return 0 if x is None else kept[-1].data_ptr()

        def from_head(matrix: Tensor) -> int:  # numbers from one head's matrix to the next; 0 where all heads share one
            return matrix.stride(0) if matrix.ndim == 3 else 0

        sizes = (self.b * self.h, self.h, self.d, self.dv, keys.bits, len(values.runs), int(keys.step * 2048))
        runs = [[r.d, r.bits, at(r.level), at(r.back), from_head(r.back), int(r.step * 2048)] for r in values.runs]
        axes = 0 if values.basis is None else values.basis.shape[1]
        shared = (at(keys.asking), at(tier.mean), at(tier.scale), at(values.basis), axes, from_head(keys.asking))
        levels, last = (at(keys.level), at(torch.tensor(runs))), tier.sinks + tier.packed
        self.parts = min(threads, THREADS, len(tier.segments), max(self.b * self.h * tier.length * self.d // PARALLEL, 1))
        jobs, first = [], tier.sinks
        for i in range(self.parts):
            own = tier.segments[len(tier.segments) * i // self.parts : len(tier.segments) * (i + 1) // self.parts]
            table = torch.tensor([[*map(at, vars(segment).values()), len(segment)] for segment in own])
            jobs.append([*sizes, *levels, at(table), len(own), first, tier.sinks, last, *shared])
            first += rows_in(own)
        self.jobs = at(torch.tensor(jobs))


def _whole(x: Tensor | None) -> Tensor:
    """Rows in a dtype and a layout that the kernel reads."""
    assert x is not None
    return (x if x.dtype in KINDS else x.float()).contiguous()


def _asked(
    q: Tensor, k: Tensor, group: int, count: int, precise: bool, out: int, mask: Tensor | None, aux: Tensor | None,
    state: OnlineSoftmax | None = None, read: Tensor | None = None, block: int = 0,
) -> list[Tensor]:  # fmt: skip
    """``Asked`` of the kernel, and what it points to."""
    kept = [] if state is None else [state.top, state.weight, state.sum]
    fields = [group, count, KINDS[q.dtype], KINDS[k.dtype], precise, out, *([x.data_ptr() for x in kept] or [0] * 3)]
    fields += [0] * 8  # aux; the mask, its strides, its kind; blocks to read, and how many a head has
    if aux is not None:
        kept.append(aux.float().contiguous())
        fields[9] = kept[-1].data_ptr()
    if mask is not None:
        mask = mask if mask.dtype in (torch.bool, torch.float32) else mask.float()
        kept.append(mask := mask if mask.stride(-1) == 1 else mask.contiguous())
        steps = [0 if size == 1 else step for size, step in zip(mask.shape[:3], mask.stride()[:3], strict=True)]
        fields[10:15] = [mask.data_ptr(), *steps, 1 if mask.dtype == torch.bool else 2]
    if read is not None:
        kept.append(read.contiguous())
        fields[15:17] = [kept[-1].data_ptr(), read.shape[2]]
    return [torch.tensor([*fields, block]), *kept]


def _run(
    held: Prepared, asked: list[Tensor], q: Tensor, k: Tensor, v: Tensor, seen: int, scaling: float, softcap: float | None, out: int | None,
    library: ctypes.CDLL | None = None,
) -> bool:  # fmt: skip
    """Whether the kernel did it: only what changes from token to token is in neither ``held`` nor ``asked``."""
    attend = (library or _library).tqai_attend  # type: ignore[union-attr]
    at = (asked[0].data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr())
    return not attend(held.jobs, held.parts, *at, k.shape[2], seen, scaling, softcap or 0.0, out)
