"""Blocks of prefixes: their bytes, the store, and vLLM's options and pages; no engine is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tqai_core.errors import TqaiError
from tqai_core.hosts import vllm
from tqai_core.hosts.vllm import options, version
from tqai_core.hosts.vllm.pages import LAYOUTS, Pages
from tqai_core.hosts.vllm.tiles import Tiles
from tqai_core.kv.bits import by_layer
from tqai_core.kv.block import BlockCoder, BlockFormat, RawCoder
from tqai_core.kv.block_store import BlockStore
from tqai_core.kv.envelope import FIXED, PREFIX, VERSION, Envelope, Miss
from tqai_core.kv.pool import Pool
from tqai_core.kv.shelf import Shelf
from tqai_core.metrics import nmse

ROOT = Path(__file__).resolve().parents[1]
KEY = b"a block"
BOUND = {2: 0.13, 3: 0.04, 4: 0.011, 5: 0.003, 6: 0.0009, 8: 0.00015, 16: 0.0}  # NMSE of normal numbers


def form(bits_k=4, bits_v=4, layers=2, heads=2, tokens=64, dim=32, dtype="bfloat16", **more) -> BlockFormat:
    widths = [(b,) * layers if isinstance(b, int) else b for b in (bits_k, bits_v)]
    return BlockFormat("model", dtype, heads, tokens, dim, *widths, **more)


def numbers(format: BlockFormat, seed: int = 0, offset: float = 3.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    kv = torch.randn(format.shape, generator=g)
    kv[0] += offset * torch.randn(*format.shape[1:3], 1, format.dim, generator=g)  # keys have means
    return kv.to(getattr(torch, format.dtype))


def round_trip(coder, kv: torch.Tensor, first: bool = False) -> torch.Tensor:
    out = torch.full_like(kv, float("nan"))
    coder.decode(coder.encode(kv, KEY, first), KEY, out)
    return out


def damaged(coder, data: bytes, key: bytes = KEY) -> str:
    """Why the bytes are refused; what was to be written is untouched."""
    out = torch.full(coder.shape, 7, dtype=torch.bfloat16 if isinstance(coder, BlockCoder) else torch.uint8)
    with pytest.raises(Miss) as found:
        coder.decode(bytearray(data), key, out)
    assert bool((out == 7).all())
    return str(found.value)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_read_is_what_was_written_with_the_error_of_its_bits(data):
    layers = data.draw(st.integers(1, 4))
    widths = st.lists(st.sampled_from(sorted(BOUND)), min_size=layers, max_size=layers).map(tuple)
    tokens, dim = data.draw(st.sampled_from([64, 80, 129])), data.draw(st.sampled_from([16, 40, 64, 128]))
    sinks, first, centre = data.draw(st.integers(0, 8)), data.draw(st.booleans()), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(["bfloat16", "float16", "float32"]))
    format = form(
        data.draw(widths), data.draw(widths), layers, data.draw(st.integers(1, 3)), tokens, dim, dtype, sinks=sinks, centre=centre
    )
    kv = numbers(format, data.draw(st.integers(0, 99)))
    packed = BlockCoder(format).encode(kv, KEY, first)
    out = torch.empty_like(kv)
    BlockCoder(format).decode(packed, KEY, out)
    assert len(packed) == BlockCoder(format).size(first)
    for which, bits in ((0, format.bits_k), (1, format.bits_v)):
        for layer in range(layers):
            x, y = kv[which, layer].double(), out[which, layer].double()
            if first:
                assert torch.equal(x[:, :sinks], y[:, :sinks])
            energy = (x - x.mean(1, keepdim=True)).square().sum() if which == 0 and centre else x.square().sum()
            rounding = 2e-5 * x.square().sum() if dtype == "bfloat16" else 1e-6 * x.square().sum()  # of the mean, and of the result
            # keys with their mean in them all look one way: the error is of dim numbers, however many rows; a bit less has 3.4 times
            spread = 2.5 if which == 0 and not centre else 1.25
            assert (x - y).square().sum() <= spread * BOUND[bits[layer]] * energy + rounding * (bits[layer] != 16)


MIXED = form((4, 5), (4, 8))
GOOD = bytes(BlockCoder(MIXED).encode(numbers(MIXED), KEY, True))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_byte_any_cut_and_any_foreign_bytes_are_a_miss(data):
    coder, packed = BlockCoder(MIXED), bytearray(GOOD)
    how = data.draw(st.sampled_from(["flip", "cut", "longer", "noise", "swap"]))
    if how == "flip":
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        packed = packed[: data.draw(st.integers(0, len(packed) - 1))]
    elif how == "longer":
        packed += data.draw(st.binary(min_size=1, max_size=64))
    elif how == "swap":
        i, j = sorted(data.draw(st.lists(st.integers(0, len(packed) - 1), min_size=2, max_size=2, unique=True)))
        if packed[i] == packed[j]:
            packed[i] ^= 255
        packed[i], packed[j] = packed[j], packed[i]
    else:
        packed = bytearray(data.draw(st.binary(max_size=4096)))
    assert damaged(coder, packed)


def test_the_reason_names_what_is_wrong():
    format = form()
    coder = BlockCoder(format)
    good = bytes(coder.encode(numbers(format), KEY, False))
    assert "cut short" in damaged(coder, good[:-1])
    assert "cut short" in damaged(coder, b"")
    assert "not a block" in damaged(coder, b"x" * len(good))
    assert f"version {VERSION + 1}" in damaged(coder, good[:4] + (VERSION + 1).to_bytes(2, "little") + good[6:])
    assert "another block's name" in damaged(coder, good, b"another block")
    assert "bits_k is [4, 4], here [5, 4]" in damaged(BlockCoder(form((5, 4))), good)
    other = BlockCoder(BlockFormat("other weights", "bfloat16", 2, 64, 32, (4, 4), (4, 4)))
    assert "model is model, here other weights" in damaged(other, good)
    broken = good[:PREFIX] + good[PREFIX:].replace(b'"kind"', b'"kin\xff"', 1)
    assert "damaged" in damaged(coder, broken)
    assert "damaged" in damaged(RawCoder("model", "bfloat16", 64), good)[:60] or "kind is rows" in damaged(RawCoder("m", "b", 64), good)


def test_a_right_checksum_over_wrong_numbers_is_refused_too():
    format = form()
    coder = BlockCoder(format)
    data = coder.encode(numbers(format), KEY, False)
    data[coder.envelope.overhead : coder.envelope.overhead + 2] = b"\x80\x7f"  # inf, in a mean
    coder.envelope.seal(data, KEY, False)
    assert "NaN or inf" in damaged(coder, data)
    short = data[: coder.envelope.overhead + 64]
    coder.envelope.seal(short, KEY, False)
    assert "of this format has" in damaged(coder, short)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=20))
def test_bytes_changed_under_a_right_checksum_are_a_miss_or_finite_numbers(changes):
    coder, packed = BlockCoder(MIXED), bytearray(GOOD)
    start = coder.envelope.overhead
    for at, change in changes:
        packed[start + at % (len(packed) - start)] ^= change
    coder.envelope.seal(packed, KEY, True)
    out = torch.zeros(coder.shape, dtype=torch.bfloat16)
    why = ""
    try:
        coder.decode(packed, KEY, out)
    except Miss as error:
        why = str(error)
    assert not why or ("out of range" in why and not out.any())
    assert bool(out.isfinite().all())


def test_a_secret_tells_forgery_from_writing():
    format = form()
    ours, theirs, plain = BlockCoder(format, secret=b"s" * 32), BlockCoder(format, secret=b"t" * 32), BlockCoder(format)
    kv = numbers(format)
    assert torch.equal(round_trip(ours, kv), round_trip(plain, kv))
    assert "secret" in damaged(ours, theirs.encode(kv, KEY, False))
    assert "keyed is False, here True" in damaged(ours, plain.encode(kv, KEY, False))
    assert "keyed is True, here False" in damaged(plain, ours.encode(kv, KEY, False))
    forged = ours.encode(kv, KEY, False)
    forged[-1] ^= 1
    plain.envelope.seal(copy := bytearray(forged), KEY, False)
    forged[FIXED.size : FIXED.size + 4] = copy[FIXED.size : FIXED.size + 4]
    assert damaged(ours, forged)


def test_every_setting_has_a_folder_of_its_own():
    formats = [form(), form(5), form(4, 5), form(sinks=5), form(centre=False), form(seed=1), form(calibration="x"), form(tokens=128),
               form(heads=3), form(dtype="float16"), BlockFormat("other", "bfloat16", 2, 64, 32, (4, 4), (4, 4))]  # fmt: skip
    names = {BlockCoder(f).envelope.name for f in formats} | {BlockCoder(form(), secret=b"s" * 16).envelope.name}
    assert len(names) == len(formats) + 1


def test_sinks_are_exact_and_stay_out_of_the_mean():
    format = form(tokens=128, dim=64)
    kv = numbers(format, offset=0.0)
    kv[:, :, :, :4] += 40.0
    with_sinks, without = (round_trip(BlockCoder(f), kv, first=True) for f in (format, form(tokens=128, dim=64, sinks=0)))
    assert torch.equal(with_sinks[:, :, :, :4], kv[:, :, :, :4])
    rest = kv[:, :, :, 4:].float()
    assert nmse(with_sinks[:, :, :, 4:].float(), rest) < 0.011
    assert nmse(without[0, :, :, 4:].float(), rest[0]) > 1.5 * nmse(with_sinks[0, :, :, 4:].float(), rest[0])
    assert nmse(round_trip(BlockCoder(format), kv, first=False)[0].float(), kv[0].float()) > 0


def test_a_calibrated_scale_evens_out_outlier_channels():
    format = form(3, tokens=128, dim=64, centre=False)
    kv = numbers(format, offset=0.0)
    loud = torch.ones(2, 2, 64)
    loud[..., ::16] = 30.0
    kv[0] = kv[0] * loud[:, :, None]
    plain, scaled = (round_trip(BlockCoder(format, scale), kv)[0].float() / loud[:, :, None] for scale in (None, loud))
    exact = kv[0].float() / loud[:, :, None]
    assert nmse(scaled, exact) < 0.04
    assert nmse(plain, exact) > 10 * nmse(scaled, exact)
    with pytest.raises(TqaiError, match="do not fit"):
        BlockCoder(format, loud[:1])


def test_rows_of_zeros_tiny_and_huge_numbers_are_held():
    format = form((4, 6), (2, 8), dim=64)
    for factor in (0.0, 1e-15, 1e15):
        kv = (numbers(format, offset=0.0).float() * factor).bfloat16()
        kv[1, :, :, ::3] = 0
        out = round_trip(BlockCoder(format), kv)
        assert bool(out.isfinite().all())
        assert torch.equal(out[1, :, :, ::3], kv[1, :, :, ::3])
        assert (out.double() - kv.double()).square().sum() <= 0.13 * kv.double().square().sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_stored(bad):
    format = form()
    for token in (5, 0):  # of the rest, and of the exact ones
        kv = numbers(format)
        kv[1, 1, 0, token, 3] = bad
        with pytest.raises(Miss, match="NaN or inf"):
            BlockCoder(format).encode(kv, KEY, True)


def test_threads_share_a_coder():
    format = form((4, 5), (4, 8), tokens=128, dim=64)
    coder, wrong = BlockCoder(format), []
    pairs = [(numbers(format, i), round_trip(BlockCoder(format), numbers(format, i))) for i in range(4)]

    def work(kv, expected):
        for _ in range(10):
            if not torch.equal(round_trip(coder, kv), expected):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_formats_that_cannot_be_are_refused_by_name():
    for bad, word in ((dict(tokens=32), "64"), (dict(bits_k=7), "7 bits"), (dict(dtype="int8"), "int8"), (dict(dim=20), "20"),
                      (dict(sinks=64), "sinks=64"), (dict(bits_k=(4,)), "1 and 2 layers")):  # fmt: skip
        with pytest.raises(TqaiError, match=word):
            form(**bad)


def test_a_fraction_of_a_bit_goes_to_whole_layers():
    assert by_layer(4, 5) == (4,) * 5
    assert by_layer(16, 3) == (16,) * 3
    assert sum(by_layer(4.3, 30)) == 129
    assert by_layer(4.3, 30)[:10] == (4,) * 10, "the first layers gain least"
    assert by_layer(5.5, 4, order=[3, 0, 1, 2]) == (6, 5, 5, 6)
    for bad in (7, 1, 9.5, 6.5):
        with pytest.raises(TqaiError, match="bits asked"):
            by_layer(bad, 4)


# -- the store


def test_a_block_is_there_whole_or_not_at_all_and_names_do_not_leave_the_folder(tmp_path):
    store = BlockStore(tmp_path, "f")
    assert store.get("ab12") is None
    store.put("ab12", b"x" * 1000)
    store.put("ab12", b"y" * 10)
    assert store.get("ab12") == b"y" * 10
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["ab12"]
    for name in ("../x", "", "a/b", "AB"):
        with pytest.raises(TqaiError, match="no name of a block"):
            store.put(name, b"")
    store.drop("ab12")
    store.drop("ab12")
    assert not store.has("ab12")


def test_the_bound_holds_and_the_least_recently_read_go_first(tmp_path):
    store = BlockStore(tmp_path, "f", limit_bytes=100_000)
    for i in range(60):
        store.put(f"{i:04x}", bytes(1000))
        os.utime(store.path(f"{i:04x}"), (i, i))
    assert store.get("0003") is not None  # read just now
    for i in range(60, 120):
        store.put(f"{i:04x}", bytes(1000))
        assert store.nbytes <= 100_000
    assert store.has("0003")
    assert not store.has("0000")
    assert store.evicted >= 20
    assert store.nbytes >= 70_000


def test_other_formats_and_dead_writers_count_too(tmp_path):
    old = BlockStore(tmp_path, "old")
    for i in range(50):
        old.put(f"{i:04x}", bytes(1000))
    part = tmp_path / "old" / "00" / "dead.part"
    part.write_bytes(bytes(30_000))
    os.utime(part, (1, 1))
    BlockStore(tmp_path, "new", limit_bytes=40_000)
    assert not part.exists()
    assert old.nbytes <= 40_000 * 7 / 8


WRITER = """
import os, sys
from tqai_core.kv.block_store import BlockStore
store, own = BlockStore(sys.argv[1], "f", 400_000), int(sys.argv[2])
bad = 0
for i in range(400):
    name = f"{(i * 7 + own * 3) % 97:04x}"
    data = store.get(name)
    bad += data is not None and (len(data) != 5000 or data != data[:1] * 5000)
    store.put(name, bytes([own + 65]) * 5000)
print(bad)
"""


def test_several_writers_and_readers_see_whole_blocks_within_the_bound(tmp_path):
    run = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(i)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    store, most = BlockStore(tmp_path, "f"), 0
    while any(p.poll() is None for p in run):
        most = max(most, store.nbytes)
        time.sleep(0.01)
    assert [p.communicate()[0].strip() for p in run] == ["0"] * 3
    assert 100_000 < most <= 400_000


def test_a_folder_that_cannot_be_written_is_told():
    with pytest.raises(TqaiError, match="cannot be written"):
        BlockStore("/proc/none", "f")
    with pytest.raises(TqaiError, match="limit_bytes=-1"):
        BlockStore("/tmp", "f", -1)


def test_a_shelf_saves_once_and_removes_what_is_not_right(tmp_path):
    format = form()
    coder = BlockCoder(format)
    shelf = Shelf(coder, BlockStore(tmp_path, coder.envelope.name))
    kv, out = numbers(format), torch.zeros(format.shape, dtype=torch.bfloat16)
    assert shelf.claim("aa")
    assert not shelf.claim("aa"), "it is on its way"
    assert shelf.save("aa", kv, False)
    assert not shelf.claim("aa"), "it is there"
    assert shelf.load("aa", out) == ""
    assert torch.equal(out, round_trip(coder, kv))
    path = shelf.store.path("aa")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "damaged" in shelf.load("aa", out)
    assert not path.exists()
    assert "not in the store" in shelf.load("aa", out)
    assert shelf.claim("aa")
    kv[0, 0, 0, 0, 0] = float("nan")
    assert not shelf.save("aa", kv, False)
    counts = shelf.take_counts()
    assert {name: counts[name] for name in ("saved", "loaded", "refused", "missed", "save_failures")} == dict.fromkeys(
        ("saved", "loaded", "refused", "missed", "save_failures"), 1
    )
    assert counts["loaded_bytes"] == counts["saved_bytes"] == coder.size(False)
    assert shelf.take_counts() == {}
    assert shelf.claim("aa"), "a save that failed may be tried again"


def test_a_pool_is_bounded_and_serves_what_is_urgent_first():
    pool, gate, done = Pool(1, 2), threading.Event(), []
    assert pool.submit([gate.wait])
    while not pool._running:
        time.sleep(0.001)
    assert pool.submit([lambda: done.append("a"), lambda: done.append("b")])
    assert not pool.submit([lambda: done.append("c")]), "two wait, no third one"
    assert pool.submit([lambda: done.append("now")], urgent=True)
    assert not pool.idle
    waiting = threading.Thread(target=pool.submit, args=([lambda: done.append("d")],), kwargs={"wait": True})
    waiting.start()
    gate.set()
    waiting.join(5)
    pool.close()
    assert done == ["now", "a", "b", "d"]
    assert not pool.submit([gate.wait])


# -- vLLM, without vLLM


def test_importing_tqai_needs_no_vllm_and_asking_for_its_host_says_what_is_missing():
    code = """
import sys, tqai_core, tqai_core.hosts, tqai_core.hosts.vllm as host
tqai_core.Config()
assert not [m for m in sys.modules if m.split(".")[0] == "vllm"]
sys.modules["vllm"] = None
from importlib import metadata
def version(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = version
for name in ("TqaiTier", "TqaiConnector"):
    try:
        getattr(host, name)
    except tqai_core.TqaiError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.count("vLLM is not installed") == 2
    with pytest.raises(AttributeError):
        _ = vllm.Nothing


@pytest.mark.parametrize("found", ["0.31.2", "0.33.0rc1", "1.32.0", "dev"])
def test_another_vllm_is_told_by_name(found):
    with pytest.raises(TqaiError, match=rf"vLLM {found} is installed, this tqai works with vLLM 0\.32"):
        version.check(found)
    version.check("0.32.0")
    version.check("0.32.1+cpu")


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({}, "'path' is missing"), ({"path": "x", "bit": "k4v4"}, "did you mean 'bits'"), ({"path": "x", "bits": "4"}, "k4.3v4"),
        ({"path": "x", "sinks": "4"}, "give a whole number"), ({"path": "x", "threads": 0}, "1 to 64"),
        ({"path": "x", "limit_bytes": -1}, "limit_bytes"),
        ({"path": "x", "sinks": True}, "give a whole number"), ({"path": 3}, "give a text"),
    ],
)  # fmt: skip
def test_options_are_checked_before_the_engine_starts(given, word):
    with pytest.raises(TqaiError, match=word):
        options.Options.read(given)


def test_options_make_the_coder_that_they_say(tmp_path):
    given = options.Options.read({"path": "x", "bits": "k4.5v4", "type": "TqaiTier"}, ignored=("type",))
    coder = given.coder("m", "bfloat16", 4, 2, 64, 32, ranks=2)
    assert coder.format.bits_k == by_layer(4.5, 4) * 2
    assert coder.format.layers == 8
    assert options.Options.read({"path": "x", "bits": "exact"}).coder("m", "bfloat16", 1, 1, 64, 32).format.bits_v == (16,)
    secret = tmp_path / "key"
    secret.write_bytes(b"short\n")
    with pytest.raises(TqaiError, match="5 bytes"):
        options.Options("x", secret_file=str(secret)).secret()
    secret.write_bytes(b"k" * 32 + b"\n")
    assert options.Options("x", secret_file=str(secret)).secret() == b"k" * 32
    with pytest.raises(TqaiError, match="secret_file"):
        options.Options("x", secret_file=str(tmp_path / "none")).secret()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("ranks", "blocks"), [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_pages_are_found_where_vllm_puts_them(layout, ranks, blocks):
    pages = Pages(layout, ranks, 3, blocks, 2, 5, 4, torch.bfloat16)
    if layout.startswith("B") and ranks > 1 and blocks > 1:
        assert layout in pages.unsupported()
        return
    assert pages.unsupported() == ""
    chunk = torch.zeros(pages.nbytes + 100, dtype=torch.uint8)
    view = pages.view(chunk)
    assert view.shape == (2, ranks * 3, 2, blocks, 5, 4)
    flat = chunk[: pages.nbytes].view(torch.bfloat16)
    for which, rank, layer, head, block, token in [(0, 0, 0, 0, 0, 0), (1, ranks - 1, 2, 1, blocks - 1, 4), (0, ranks - 1, 1, 1, 0, 3)]:
        page = 2 * 2 * 5 * 4
        outer = layer * blocks + block if layout.startswith("L") else block * 3 + layer
        inner = head * 5 + token if layout.endswith("HNC") else token * 2 + head
        at = rank * 3 * blocks * page + outer * page + inner * 8 + which * 4
        view[which, rank * 3 + layer, head, block, token, 2] = 9.0
        assert flat[at + 2] == 9.0
        flat[at + 2] = 0
    assert Pages("LHBNC", 1, 3, 1, 2, 5, 4, torch.bfloat16).unsupported()


def test_the_places_of_tiles_are_asked_of_their_writer():
    heads, tokens, dim = 2, 8, 4

    def write(k, v, block):  # pairs of tokens side by side, values before keys
        x = torch.stack([v, k]).unflatten(1, (-1, 2)).permute(3, 0, 1, 4, 2)
        block.copy_(x.reshape(block.shape))

    block = torch.zeros(1, heads, tokens, 2 * dim, dtype=torch.bfloat16)
    tiles = Tiles.ask(write, block, (heads, tokens, dim))
    kv = torch.randn(2, heads, tokens, dim).bfloat16()
    write(kv[0].transpose(0, 1), kv[1].transpose(0, 1), block)
    assert torch.equal(block.flatten()[tiles.logical].view(kv.shape), kv)
    assert torch.equal(kv.flatten()[tiles.physical], block.flatten())
    with pytest.raises(TqaiError, match="cannot be packed"):
        Tiles.ask(lambda k, v, out: out.fill_(1), block, (heads, tokens, dim))
    with pytest.raises(TqaiError, match="numbers"):
        Tiles.ask(write, block[..., :-1], (heads, tokens, dim))


def test_bytes_that_are_no_rows_are_stored_as_they_are():
    coder = RawCoder("m", "float8", 1000)
    x = torch.randint(0, 256, (1000,), dtype=torch.uint8)
    out = torch.zeros_like(x)
    data = coder.encode(x, KEY, False)
    coder.decode(data, KEY, out)
    assert torch.equal(out, x)
    data[-3] ^= 1
    with pytest.raises(Miss, match="damaged"):
        coder.decode(data, KEY, out)


def test_the_header_is_plain_json_that_its_schema_knows():
    from tqai_core.files import checked

    for envelope in (BlockCoder(form()).envelope, RawCoder("m", "bfloat16", 8).envelope, Envelope(form().fields, b"k" * 16)):
        assert checked("Block", json.loads(envelope.header), what="block", again="x")
        assert (PREFIX + len(envelope.header)) % 64 == 0
