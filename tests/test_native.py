"""The C and Triton kernels of the packed attention against the torch path."""

from __future__ import annotations

import copy
import os
import pickle
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai_core.attention.backends import native
from tqai_core.attention.packed import attend
from tqai_core.codecs.rows import BITS
from tqai_core.kv.cache import PackedKV
from tqai_core.kv.segments import Plan

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"tuned": (), "plain": ("-DTQAI_PLAIN",)} | ({"avx2": ("-mno-avx512f",)} if platform.machine() in ("x86_64", "AMD64") else {})
compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")


@pytest.fixture(scope="module")
def library_files(tmp_path_factory):
    """The library for this CPU, and the one in plain C that any CPU runs."""
    folder = tmp_path_factory.mktemp("native")
    return {name: native.build(folder, flags) for name, flags in KINDS.items()}


@pytest.fixture(scope="module")
def libraries(library_files):
    return {name: native.load(path) for name, path in library_files.items()}


@pytest.fixture(params=KINDS)
def kernel(request, libraries, monkeypatch):
    monkeypatch.delenv("TQAI_NATIVE", raising=False)
    monkeypatch.setattr(native, "_library", libraries[request.param])
    monkeypatch.setattr(native, "_why", "")
    return request.param


def filled(plan, n, b=1, h=2, d=64, dv=None, dtype=torch.float32, group=2, seed=0, piece=None):
    g = torch.Generator().manual_seed(seed)
    kv = PackedKV(plan)
    for at in range(0, n, piece or max(n, 1)):
        m = min(piece or n, n - at)
        k = torch.randn(b, h, m, d, generator=g) * torch.linspace(0.3, 3, d) + 1
        kv.append(k.to(dtype), torch.randn(b, h, m, dv or d, generator=g).to(dtype))
        kv.observe(torch.randn(b, h * group, m, d, generator=g).to(dtype))
        kv.settle()
    return kv


def both(kv, q, **options):
    """Native and torch; the native one must really have run."""
    ran = []
    run = native._run
    native._run = lambda *args: ran.append(1) or run(*args)
    try:
        fast = attend(q, kv, **options)
    finally:
        native._run = run
    assert bool(ran) == bool(kv.segments)
    slow = attend(q, kv, native=False, **options)
    assert fast.dtype == slow.dtype
    return fast.float(), slow.float()


def close(fast, slow, dtype):
    """Within the rounding of bf16; fp32 queries come nearer, by what weights of 15 bits leave."""
    assert fast.isfinite().all()
    limit = 1e-4 if dtype == torch.float32 else 4e-3
    assert float((fast - slow).norm()) <= limit * float(slow.norm()) + 1e-6


@compiler
@settings(max_examples=40, deadline=None)
@given(
    bits=st.tuples(st.sampled_from(BITS), st.sampled_from(BITS)),
    d=st.sampled_from([32, 64, 96, 128, 160, 256]), dv=st.sampled_from([32, 64, 96, 128]),
    h=st.integers(1, 3), group=st.integers(1, 9), b=st.integers(1, 2), count=st.integers(1, 3),
    n=st.sampled_from([0, 1, 3, 32, 33, 65, 100, 129, 1100]), sink=st.integers(0, 4), recent=st.sampled_from([0, 1, 7, 32, 100]),
    calibrate=st.sampled_from([0, 20]), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(sorted(KINDS)), softcap=st.sampled_from([None, 20.0]), aux=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_native_equals_torch(libraries, bits, d, dv, h, group, b, count, n, sink, recent, calibrate, dtype, kind, softcap, aux, seed):
    kept, native._library = native._library, libraries[kind]
    try:
        kv = filled(Plan(*bits, sink=sink, recent=recent, calibrate=calibrate), n, b, h, d, dv, dtype, group, seed, piece=70)
        g = torch.Generator().manual_seed(seed + 1)
        kv.append(torch.randn(b, h, count, d, generator=g).to(dtype), torch.randn(b, h, count, dv, generator=g).to(dtype))
        q = torch.randn(b, h * group, count, d, generator=g).to(dtype)
        more = torch.randn(h * group, generator=g) if aux else None
        close(*both(kv, q, scaling=d**-0.5, softcap=softcap, aux=more), dtype)
    finally:
        native._library = kept


@compiler
@pytest.mark.parametrize("bits", BITS)
def test_masks_and_queries_that_do_not_see_all(kernel, bits):
    kv = filled(Plan(bits, bits, recent=32), 400, b=2)
    n, q = kv.length, torch.randn(2, 4, 3, 64, generator=torch.Generator().manual_seed(5))
    pad = torch.arange(n)[None] <= torch.arange(n - 3, n)[:, None]
    left = pad[None, None].repeat(2, 1, 1, 1)
    left[0, :, :, :90] = False
    per_head = left.repeat(1, 4, 1, 1)
    per_head[:, 1, :, 100:200] = False
    added = torch.zeros(left.shape).masked_fill(~left, torch.finfo(torch.float32).min)
    strided = left.transpose(2, 3).contiguous().transpose(2, 3)
    for mask in (None, left, per_head, added, added.bfloat16(), strided, left[:, :, :1], left[:1]):
        close(*both(kv, q, scaling=0.3, mask=mask), torch.float32)
    hidden = left.clone()
    hidden[1] = False
    fast, _ = both(kv, q, scaling=0.3, mask=hidden)
    assert torch.equal(fast[1], torch.zeros(4, 3, 64))
    early = filled(Plan(bits, bits, recent=0, sink=0), 300)
    close(*both(early, torch.randn(1, 4, 5, 64), scaling=0.3), torch.float32)  # the first of five does not see the last four


@compiler
def test_extreme_scores_and_values(kernel):
    """Weights of one token against thousands, gains of any size, zeros."""
    g = torch.Generator().manual_seed(0)
    for size, grow in ((1e-12, 1.0), (1e8, 1.0), (1.0, 40.0), (0.0, 1.0)):
        kv = PackedKV(Plan(recent=4, calibrate=0))
        v = torch.randn(1, 1, 2000, 64, generator=g) * size
        kv.append(torch.randn(1, 1, 2000, 64, generator=g) * grow, v)
        kv.settle()
        fast, slow = both(kv, torch.randn(1, 3, 1, 64, generator=g), scaling=1.0)
        assert float((fast - slow).norm()) <= 3e-3 * float(slow.norm()) + 1e-30
    kv = filled(Plan(recent=32), 400)
    q = torch.randn(1, 4, 1, 64)
    q[0, 1, 0, 3] = float("nan")
    fast, slow = attend(q, kv, scaling=1.0), attend(q, kv, scaling=1.0, native=False)
    assert torch.equal(fast.isnan(), slow.isnan())
    assert fast[:, 1].isnan().all()


@compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_the_tokens(kernel, monkeypatch, dtype):
    monkeypatch.setattr(native, "PARALLEL", 1)
    kv = filled(Plan(recent=32), 5000, b=2, dtype=dtype)
    q = torch.randn(2, 4, 1, 64).to(dtype)
    mask = torch.rand(2, 4, 1, 5000) > 0.3
    mask[1, :, :, :4000] = False  # a sequence whose first threads see nothing
    ways = ({}, {"mask": mask}, {"aux": torch.randn(4)}, {"softcap": 5.0})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    one = [attend(q, kv, scaling=0.3, **options) for options in ways]
    for count in (2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        for options, alone in zip(ways, one, strict=True):
            close(*both(kv, q, scaling=0.3, **options), dtype)
            more = attend(q, kv, scaling=0.3, **options)
            limit = 5e-6 if dtype == torch.float32 else 3e-3  # sums in another order; bf16 rounds the result
            assert float((more - alone).float().norm()) <= limit * float(alone.float().norm())


@compiler
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("d", [32, 64, 96, 128, 160])
def test_queries_in_fp32_keep_their_digits(kernel, d, bits):
    """Scores so large that a query of 15 bits would move weights: two digits do not."""
    g = torch.Generator().manual_seed(bits)
    kv = PackedKV(Plan(bits, bits, recent=0, calibrate=0))
    kv.append(torch.randn(1, 2, 333, d, generator=g), torch.randn(1, 2, 333, d, generator=g))
    kv.settle()
    q = torch.randn(1, 6, 1, d, generator=g)
    fast, slow = both(kv, q, scaling=40 * d**-0.5)
    assert float((fast - slow).norm()) <= 1e-4 * float(slow.norm())
    coarse, near = both(kv, q.bfloat16(), scaling=40 * d**-0.5)
    assert float((coarse - near).norm()) <= 2e-2 * float(near.norm())


@compiler
def test_rows_that_changed_are_prepared_anew(kernel):
    """Every way in which packed rows, or what is asked of them, can change between two calls of one cache."""
    kv, g = filled(Plan(recent=32), 1500, b=2), torch.Generator().manual_seed(3)
    token = lambda b=2, h=2: torch.randn(b, h, 1, 64, generator=g)

    def step(kv, b=2, **options):
        kv.append(token(b), token(b))
        close(*both(kv, token(b, 4), **{"scaling": 0.1} | options), torch.float32)
        kv.settle()

    for i in range(70):  # packs twice
        step(kv, scaling=0.1 + i % 3)
    step(kv, softcap=3.0)
    step(kv, aux=torch.randn(4, generator=g))
    step(kv, mask=torch.rand(2, 1, 1, kv.length + 1, generator=g) > 0.5)
    other = pickle.loads(pickle.dumps(copy.deepcopy(kv)))
    step(kv)
    kv.map_batch(lambda x: x.flip(0))
    step(kv)
    kv.crop(400)
    step(kv)
    kv.map_batch(lambda x: x[:1])
    step(kv, b=1)
    kv.move("cpu")
    step(kv, b=1)
    tensors, header = kv.state()
    kv.restore(tensors, header)
    step(kv, b=1)
    step(other)
    kv.clear()
    step(kv, b=1)


@compiler
def test_what_it_leaves_to_torch(kernel, monkeypatch):
    monkeypatch.setattr(native, "_run", lambda *a: pytest.fail("native ran"))
    attend(torch.randn(1, 2, 1, 48), filled(Plan(recent=32), 400, d=48), scaling=1.0)
    attend(torch.randn(1, 4, 40, 64), filled(Plan(recent=32), 400), scaling=1.0)
    kv = filled(Plan(recent=32), 400)
    attend(torch.randn(1, 4, 1, 64), kv, scaling=1.0, native=False)
    monkeypatch.setenv("TQAI_NATIVE", "0")
    attend(torch.randn(1, 4, 1, 64), kv, scaling=1.0)
    assert "TQAI_NATIVE=0" in native.status()


# -- building and falling back


def fresh(monkeypatch, tmp_path):
    monkeypatch.delenv("TQAI_NATIVE", raising=False)
    monkeypatch.setenv("TQAI_CACHE", str(tmp_path))
    forget(monkeypatch)


def forget(monkeypatch):
    """The next call looks for the library again, as a fresh process would."""
    monkeypatch.setattr(native, "_library", None)
    monkeypatch.setattr(native, "_why", "")


@compiler
def test_it_is_built_once_and_found_again(monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path / "sub")
    assert native.ready()
    assert native.status() == ""
    assert native.kind() in ("avx512", "avx2", "plain C")
    (made,) = (tmp_path / "sub").iterdir()
    before = made.stat().st_mtime_ns
    fresh(monkeypatch, tmp_path / "sub")
    assert native.ready()
    assert made.stat().st_mtime_ns == before
    assert native.build(tmp_path / "sub", ("-DTQAI_PLAIN",)) != made


@pytest.mark.parametrize("what", ["missing", "fails", "wrong", "read only"])
def test_any_failure_leaves_torch_and_one_line(what, monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path)
    if what == "missing":
        monkeypatch.setenv("CC", "no-such-compiler")
    elif what == "fails":
        monkeypatch.setenv("CC", shutil.which("false"))
    elif what == "wrong":
        if not any(map(shutil.which, ("cc", "gcc", "clang"))):
            pytest.skip("no C compiler here")
        broken = tmp_path / "broken.c"
        broken.write_text(native.SOURCE.read_text().replace("return b->unit / up;", "return b->unit;"))
        monkeypatch.setattr(native, "SOURCE", broken)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TQAI_CACHE", str(tmp_path / "file"))
    kv, q = filled(Plan(recent=32), 400), torch.randn(1, 4, 1, 64)
    assert torch.equal(attend(q, kv, scaling=1.0), attend(q, kv, scaling=1.0, native=False))
    assert native.status().startswith("native kernel not used (")
    assert "\n" not in native.status()
    assert not native.ready()


# -- whose library it is


@pytest.fixture
def built(library_files, monkeypatch, tmp_path):
    """Makes a cache folder that holds the library of this machine, as a call before would have left it."""

    def make(folder):
        folder.mkdir(parents=True, mode=0o700)
        fresh(monkeypatch, folder)
        path = Path(shutil.copy2(library_files["tuned"], folder))
        assert native.build() == path, "it is not built again"
        return path

    return make


def refused(monkeypatch, words):
    """Nothing is loaded, torch computes, the reason is told."""
    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: pytest.fail(f"{name} is loaded"))
    kv, q = filled(Plan(recent=32), 400), torch.randn(1, 4, 1, 64)
    assert torch.equal(attend(q, kv, scaling=1.0), attend(q, kv, scaling=1.0, native=False))
    assert native.status().startswith("native kernel not used (")
    for word in words:
        assert word in native.status()


posix = pytest.mark.skipif(os.name != "posix", reason="owners and modes of files are POSIX's")
root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")


@compiler
@posix
@pytest.mark.parametrize("cut", [0, 100, 4096, -1])
def test_a_truncated_library_is_not_loaded(built, monkeypatch, tmp_path, cut):
    path = built(tmp_path / "c")
    path.write_bytes(path.read_bytes()[:cut])
    refused(monkeypatch, (str(path), "changed or cut off", "delete it"))


@compiler
@posix
def test_a_planted_library_is_not_loaded(built, monkeypatch, tmp_path):
    path = built(tmp_path / "c")
    path.write_bytes(path.read_bytes() + b"planted")
    refused(monkeypatch, ("changed or cut off",))


@compiler
@posix
@root
def test_a_library_or_a_folder_of_another_user_is_not_used(built, monkeypatch, tmp_path):
    path = built(tmp_path / "a" / "c")
    for owned, word in ((path, "library"), (path.parent, "cache folder"), (path.parent.parent, "above it")):
        os.chown(owned, 12345, -1)
        refused(monkeypatch, (word, "belongs to user 12345"))
        os.chown(owned, 0, -1)
        forget(monkeypatch)


@compiler
@posix
@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_what_others_can_write_is_not_used(built, monkeypatch, tmp_path, mode):
    path = built(tmp_path / "a" / "c")
    for open_to_all, word in ((path, "library"), (path.parent, "cache folder"), (path.parent.parent, "above it")):
        open_to_all.chmod(mode)
        refused(monkeypatch, (word, "can be written by others"))
        open_to_all.chmod(0o700)
        forget(monkeypatch)


@compiler
@posix
def test_symbolic_links_are_not_followed(built, monkeypatch, tmp_path):
    path = built(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.setenv("TQAI_CACHE", str(tmp_path / "link"))
    refused(monkeypatch, ("symbolic link",))
    forget(monkeypatch)
    monkeypatch.setenv("TQAI_CACHE", str(tmp_path / "real"))
    path.rename(tmp_path / "elsewhere.so")
    path.symlink_to(tmp_path / "elsewhere.so")
    refused(monkeypatch, (str(path), "symbolic link"))


@compiler
@posix
def test_a_sticky_folder_above_is_no_reason_to_refuse(built, monkeypatch, tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    native.load(built(tmp_path / "tmp" / "c"))


@compiler
def test_the_process_lives_with_a_cut_library(built, tmp_path):
    """In a process of its own: the system's loader ends it with SIGBUS otherwise."""
    path = built(tmp_path / "c")
    code = "from tqai_core.attention.backends import native; print(native.ready(), native.status())"
    env = {**os.environ, "TQAI_CACHE": str(path.parent), "PYTHONPATH": str(ROOT)}
    ask = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert ask() == "True \n"
    path.write_bytes(path.read_bytes()[:4096])
    assert ask().startswith("False native kernel not used (library ")


@compiler
@posix
def test_without_a_home_one_private_folder_is_made_and_used_again(monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path)
    for name in ("TQAI_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(native.Path, "home", homeless)
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path))
    assert native.ready(), native.status()
    folder = tmp_path / f"tqai-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    (made,) = folder.iterdir()
    before = made.stat().st_mtime_ns
    forget(monkeypatch)
    assert native.ready()
    assert list(tmp_path.iterdir()) == [folder], "nothing else is left behind"
    assert [p.stat().st_mtime_ns for p in folder.iterdir()] == [before], "it is not built again"
    forget(monkeypatch)
    folder.chmod(0o777)
    refused(monkeypatch, ("can be written by others", "TQAI_CACHE"))


@compiler
@posix
def test_a_compiler_of_several_words_is_found(monkeypatch, tmp_path):
    wrapper = tmp_path / "my wrapper"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o700)
    fresh(monkeypatch, tmp_path / "c")
    monkeypatch.setenv("CC", f"'{wrapper}' cc -DTQAI_PLAIN")
    assert native.ready(), native.status()
    assert native.kind() == "plain C"
    forget(monkeypatch)
    monkeypatch.setenv("CC", "'cc")
    assert not native.ready()
    assert "is no command" in native.status()


def test_import_builds_nothing(tmp_path):
    code = "import tqai_core.attention.packed, sys; print('triton' in sys.modules)"
    env = {**os.environ, "TQAI_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert run.stdout.strip() == "False"
    assert list(tmp_path.iterdir()) == []


# -- Triton


def test_triton_in_its_interpreter_equals_torch():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    env = {**os.environ, "TRITON_INTERPRET": "1", "TQAI_TRITON": "1", "TQAI_NATIVE": "0"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("equal") == 8


def _interpret() -> None:
    from tqai_core.attention.backends import triton_packed

    seen = []
    inner = triton_packed.block_states
    triton_packed.block_states = lambda *a: seen.append(1) or inner(*a)
    g = torch.Generator().manual_seed(1)
    sizes = ((64, 64, 1, 1, 400), (96, 32, 3, 2, 397), (128, 64, 4, 1, 365), (32, 32, 9, 3, 321))
    for i, (bits_k, bits_v) in enumerate(((2, 3), (3, 2), (4, 4), (8, 8))):
        for d, dv, group, count, n in (sizes[i], sizes[(i + 1) % 4]):
            kv = filled(Plan(bits_k, bits_v, recent=32), n, b=2, d=d, dv=dv, group=group)
            q = torch.randn(2, 2 * group, count, d, generator=g)
            mask = torch.rand(2, 1, count, n, generator=g) > 0.2
            for options in ({}, {"mask": mask, "softcap": 15.0, "aux": torch.randn(2 * group, generator=g)}):
                fast, slow = attend(q, kv, scaling=0.2, **options), attend(q, kv, scaling=0.2, native=False, **options)
                assert torch.allclose(fast, slow, atol=2e-5), (bits_k, bits_v, d, float((fast - slow).abs().max()))
            print("equal")
    assert len(seen) == 16


if __name__ == "__main__":
    torch.set_num_threads(1)
    _interpret()
