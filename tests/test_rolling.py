"""The rolling history of a video that grows block by block: what stays exact, what leaves, and how close the rest is."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tqai_core import TqaiError
from tqai_core.codecs.transform import ERROR, Transform, allocate, cosine
from tqai_core.kv.rolling import Rolling
from tqai_core.metrics import nmse, psnr
from tqai_core.types import nbytes

FRAME, HEADS, DIM = 24, 2, 32


def video(frames: int, batch: int = 1, seed: int = 0, rank: int = 6, still: float = 0.97, noise: float = 0.02) -> Tensor:
    """Numbers ``[B, tokens, H, D]`` that lie near ``rank`` axes of each head and change slowly from frame to frame."""
    g = torch.Generator().manual_seed(seed)
    rnd = lambda *size: torch.randn(size, generator=g)
    axes, state, out = rnd(HEADS, rank, DIM), rnd(batch, FRAME, HEADS, rank), []
    for _ in range(frames):
        out.append(torch.einsum("bphr,hrd->bphd", state, axes) + noise * rnd(batch, FRAME, HEADS, DIM) + 0.5)
        state = still * state + (1 - still**2) ** 0.5 * rnd(batch, FRAME, HEADS, rank)
    return torch.cat(out, 1)


def fill(history: Rolling, k: Tensor, v: Tensor, sizes: tuple[int, ...] = (4,), q: Tensor | None = None) -> Rolling:
    """Append frame after frame, as many at a time as ``sizes`` says, over and over."""
    at, number = 0, 0
    while at < k.shape[1]:
        end = at + sizes[number % len(sizes)] * FRAME
        history.append(k[:, at:end], v[:, at:end], None if q is None else q[:, at:end])
        at, number = end, number + 1
    return history


def kept(x: Tensor, sink: int, window: int) -> Tensor:
    """The frames that a history of ``window`` frames still holds."""
    frames = x.unflatten(1, (-1, FRAME))
    extra = max(frames.shape[1] - window, 0)
    return torch.cat([frames[:, :sink], frames[:, sink + extra :]], 1).flatten(1, 2)


@pytest.mark.parametrize("sizes", [(4,), (1,), (3, 1, 5)], ids=str)
@pytest.mark.parametrize(("sink", "recent", "window", "group"), [(2, 3, 11, 4), (0, 0, 7, 3), (5, 1, 13, 2)])
def test_frames_leave_one_by_one_and_what_is_exact_is_so_bit_by_bit(sizes, sink, recent, window, group):
    k, v = video(29), video(29, seed=1)
    for end in (1, 6, 14, 27, 29):
        options = dict(sink=sink, recent=recent, window=window, group=group)
        exact = fill(Rolling(FRAME, codec="exact", **options), k[:, : end * FRAME], v[:, : end * FRAME], sizes)
        wanted = [kept(x[:, : end * FRAME], sink, window) for x in (k, v)]
        assert all(map(torch.equal, exact.get(), wanted))
        packed = fill(Rolling(FRAME, **options), k[:, : end * FRAME], v[:, : end * FRAME], sizes)
        found = packed.get()
        assert packed.frames == exact.frames == min(end, window)
        assert packed.packed >= packed.frames - sink - recent - group + 1
        for x, y in zip(found, wanted, strict=True):
            assert nmse(x, y) < 0.02
            assert torch.equal(x[:, : sink * FRAME], y[:, : sink * FRAME])
            assert torch.equal(x[:, x.shape[1] - recent * FRAME :], y[:, y.shape[1] - recent * FRAME :])
            # the frame that is read in a place is the one that belongs there: its neighbours are far from it
            of_place = (x - y).unflatten(1, (-1, FRAME)).square().mean((0, 2, 3, 4))
            assert of_place.max() < 0.1 * y.var()


def test_a_second_video_after_clear_is_the_first_one_bit_by_bit():
    k, v = video(40), video(40, seed=1)
    history = Rolling(FRAME, window=24)
    first = fill(history, k, v, q=k).get()
    assert history.packed
    history.clear()
    assert history.nbytes == history.frames == 0
    assert history.get() is None
    assert all(map(torch.equal, fill(history, k, v, q=k).get(), first))


def test_rows_of_a_batch_do_not_know_each_other():
    k, v = video(40, batch=2), video(40, batch=2, seed=1)
    k[1, 20 * FRAME :] = video(20, seed=5)[0] * 3  # one of them changes its scene
    both = fill(Rolling(FRAME, window=24), k, v, q=k).get()
    for row in range(2):
        one = slice(row, row + 1)
        alone = fill(Rolling(FRAME, window=24), k[one], v[one], q=k[one]).get()
        assert all(torch.equal(x[one], y) for x, y in zip(both, alone, strict=True))


def test_a_frame_is_coded_once():
    k, v = video(40), video(40, seed=1)
    history = fill(Rolling(FRAME, sink=1, recent=4, window=36), k[:, : 20 * FRAME], v[:, : 20 * FRAME])
    groups = list(history.groups)
    codes = [one.codes.clone() for group in groups for pair in group.rows for one in pair]
    before = history.get()[0]
    fill(history, k[:, 20 * FRAME :], v[:, 20 * FRAME :])
    assert history.groups[: len(groups) - 1] == groups[1:]  # a group has left
    left = [one.codes for group in groups for pair in group.rows for one in pair]
    assert all(map(torch.equal, codes, left))
    assert torch.allclose(history.get()[0][:, FRAME : 9 * FRAME], before[:, 5 * FRAME : 13 * FRAME], atol=1e-5)


def test_bytes_are_walked_and_stop_growing():
    k, v = video(80), video(80, seed=1)
    history = Rolling(FRAME, sink=1, recent=4, window=36, bits_k=2, bits_v=1)
    sizes = []
    for at in range(0, 80, 4):
        fill(history, k[:, at * FRAME : (at + 4) * FRAME], v[:, at * FRAME : (at + 4) * FRAME])
        sizes.append(history.nbytes)
    assert max(sizes[-8:]) <= 1.02 * min(sizes[-8:])
    coders = [coder for pair in history.groups[0].coders for coder in pair]
    assert all(group.coders == history.groups[0].coders for group in history.groups)
    parts = [[vars(one) for group in history.groups for pair in group.rows for one in pair], [vars(coder) for coder in coders]]
    assert history.nbytes == nbytes([history.first, history.last, history.error, *parts])
    numbers = HEADS * DIM * FRAME * history.group * len(history.groups)
    codes = [8 * sum(nbytes(vars(pair[i])) for group in history.groups for pair in group.rows) / numbers for i in (0, 1)]
    assert 1.8 < codes[0] <= 2.1
    assert 0.85 < codes[1] <= 1.1
    assert 8 * history.nbytes_packed / (2 * numbers) < 1.5 * 1.3  # with axes and statistics
    assert history.nbytes < 0.4 * nbytes(history.get())


def error(bits: float, **options: float) -> float:
    k, v = video(40, **options), video(40, seed=1, **options)
    found = fill(Rolling(FRAME, sink=1, recent=4, window=40, bits_k=bits, bits_v=bits), k, v)
    assert found.packed > 30
    return nmse(found.get()[0] - 0.5, k - 0.5)


def test_closeness_follows_the_structure():
    """Six axes of 32, slow: far below the error of plain rows. Without any structure no worse than a quantiser of Gaussian numbers."""
    assert error(4) < error(2) < error(1) / 8  # of six axes no number has more than eight bits
    assert error(2) < 2e-3
    assert error(2, still=0.0) < 6e-3
    assert error(2, rank=32, still=0.0) < 1.25 * ERROR[2]


def test_outlier_channels_cost_nothing_where_queries_are_seen():
    k, v, q = video(40), video(40, seed=1), video(40, seed=2)
    big = torch.ones(DIM)
    big[[2, 3, 18, 19]] = 125.0

    def of_scores(scale: Tensor, seen: bool) -> float:
        history = Rolling(FRAME, sink=1, recent=4, window=40)
        found = fill(history, k * scale, v, q=q / scale if seen else None).get()[0]
        scores = lambda keys: torch.einsum("bqhd,bkhd->bhqk", (q / scale)[:, :FRAME], keys)
        return nmse(scores(found), scores(k * scale))

    plain = of_scores(torch.ones(DIM), seen=True)
    assert of_scores(big, seen=True) < 1.25 * plain
    assert of_scores(big, seen=False) > 4 * plain


def test_another_scene_gets_coders_of_its_own():
    cut = [torch.cat([video(24, seed=i), 2 * video(24, seed=7 + i)], 1) for i in range(2)]
    coders = lambda history: len({id(pair[0]) for group in history.groups for pair in group.coders})
    history = fill(Rolling(FRAME, sink=1, recent=4, window=40), *cut)
    assert coders(history) >= 2
    assert nmse(history.get()[0][:, FRAME:], kept(cut[0], 1, 40)[:, FRAME:]) < 4e-3
    assert coders(fill(Rolling(FRAME, sink=1, recent=4, window=40), video(48), video(48, seed=1))) == 1


def test_numbers_that_are_none_stay_exact_and_the_reason_is_told():
    k, v = video(30), video(30, seed=1)
    k[0, 14 * FRAME, 0, 0] = float("nan")
    history = fill(Rolling(FRAME, sink=1, recent=2, window=20), k, v)
    assert "NaN" in history.why
    found = history.get()
    assert history.frames == 20
    assert torch.equal(found[1][:, -10 * FRAME :], v[:, -10 * FRAME :])
    assert torch.equal(found[0][:, -10 * FRAME :], k[:, -10 * FRAME :])


def test_half_precision_and_views_of_the_model_are_safe():
    k, v = video(30).bfloat16(), video(30, seed=1).bfloat16()
    history = Rolling(FRAME, sink=2, recent=4, window=24)
    buffer = torch.empty(1, 2 * FRAME, HEADS, DIM, dtype=torch.bfloat16)
    for at in range(0, 30, 2):
        buffer.copy_(k[:, at * FRAME : (at + 2) * FRAME])
        history.append(buffer, v[:, at * FRAME : (at + 2) * FRAME])
        buffer.zero_()
    keys, values = history.get()
    assert keys.dtype == values.dtype == torch.bfloat16
    assert torch.equal(keys[:, -4 * FRAME :], k[:, -4 * FRAME :])
    assert nmse(keys, kept(k, 2, 24)) < 2e-3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(window=3, sink=2, recent=2), "at least sink"), (dict(codec="turbo"), "transform and exact"), (dict(bits_k=0.1), "0.25 to 8"),
        (dict(group=0), "at least one"), (dict(recent=-1), "at least"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(TqaiError, match=said):
        Rolling(FRAME, **options)


def test_what_does_not_belong_is_refused_and_the_history_left_as_it_was():
    k, v = video(12), video(12, seed=1)
    history = fill(Rolling(FRAME, window=24), k, v)
    before = history.get()
    for x, y, said in (
        (k[:, :30], v[:, :30], "whole frames"),
        (k[:, :FRAME], v[:, : 2 * FRAME], "whole frames"),
        (k[:, :FRAME].double(), v[:, :FRAME].double(), "another model or batch"),
        (k[:, :FRAME, :1], v[:, :FRAME, :1], "another model or batch"),
    ):
        with pytest.raises(TqaiError, match=said):
            history.append(x, y)
    assert all(map(torch.equal, history.get(), before))


def test_bits_go_where_the_energy_is_and_all_are_spent():
    energy = torch.tensor([[16.0, 4.0], [1.0, 0.0]])
    assert int(allocate(energy, 6).sum()) == 6
    assert allocate(energy, 6).tolist() == [[3, 2], [1, 0]]
    assert int(allocate(energy, 100).sum()) == 32
    assert torch.allclose(cosine(5) @ cosine(5).mT, torch.eye(5), atol=1e-6)


def test_groups_are_decoded_together_as_each_alone():
    x = video(16).unflatten(1, (4, 4, FRAME)).permute(0, 4, 1, 3, 2, 5)[0]  # [H, groups, P, T, D]
    coder = Transform.fit(x.flatten(1, 2), 2.0, 10 * FRAME)
    groups = [coder.encode(own) for own in x.unbind(1)]
    alone = torch.cat([coder.decode(group) for group in groups], 1)
    assert torch.allclose(coder.decode(*groups), alone, atol=1e-5)
    nothing = replace(coder, bits=torch.zeros_like(coder.bits))
    assert torch.allclose(nothing.decode(nothing.encode(x[:, 0])), coder.mean.float().expand_as(x[:, 0]))


def test_the_peers_of_the_bench_are_held_as_they_are_counted():
    pytest.importorskip("diffusers")
    from bench.rolling import Centroids, Integers, Peer

    x = torch.randn(256, 1, 128, generator=torch.Generator().manual_seed(0)) + 3
    for scheme, bits, most in (
        (Integers(8), 8.5, 4e-6), (Integers(4), 4.5, 1e-3), (Integers(2), 2.5, 0.03), (Integers(4, 256, rotated=True), 4.0625, 0.03),
        (Centroids(4), 2.4375, 0.06), (Centroids(2, zero=True), 2.4375, 0.03), (Centroids(16, zero=True, counted=False), 2.3125, 0.03),
    ):  # fmt: skip
        for keys in (True, False):
            back, held = scheme.hold(x, keys, 1)
            assert 8 * held / x.numel() == bits
            assert nmse(back, x) < most
    apart = torch.cat([x[:1] * 0 + 5, x[:1] * 0 - 5]).repeat(128, 1, 1) + x * 1e-3
    assert nmse(Centroids(2).hold(apart, True, 3)[0], apart) < 1e-6, "two heaps are two centroids"
    frames = torch.randn(1, 64 * 40, 1, 128, generator=torch.Generator().manual_seed(1))
    peer = Peer(Integers(8))
    for part in frames.split(256, 1):
        peer.append(part, part)
    found, wanted = peer.get()[0], torch.cat([frames[:, :256], frames[:, -24 * 64 :]], 1)
    assert torch.equal(found[:, :256], wanted[:, :256])
    assert torch.equal(found[:, -256:], wanted[:, -256:])
    assert nmse(found, wanted) < 1e-4


# -- the causal mini: diffusers' own class


def causal_model():
    pytest.importorskip("diffusers")
    from bench import causal

    return causal, causal.trained()


def test_a_block_that_rolls_is_the_block_that_was_taught():
    causal, model = causal_model()
    x, prompt = torch.randn(1, 1, 12, 16, 16, generator=torch.Generator().manual_seed(0)), causal.minis.prompts("wan", [3])[0]
    with torch.no_grad():
        taught = model.teach(x, x, torch.full((1, 3), 0.4), prompt).split(4, 2)
    model.begin([causal.Dense() for _ in model.readers])
    for part, wanted in zip(x.split(4, 2), taught, strict=True):
        assert nmse(model.velocity(part, 0.4, prompt), wanted) < 1e-9
        model.keep(part, prompt)


def test_the_causal_mini_rolls_on_the_packed_history():
    causal, model = causal_model()
    noise, prompt = torch.randn(1, 1, 28, 16, 16, generator=torch.Generator().manual_seed(0)), causal.minis.prompts("wan", [3])[0]
    videos = {}
    for name, options in {"dense": None, "exact": dict(codec="exact"), "2": {}, "again": {}}.items():
        make = lambda: Rolling(causal.TOKENS, sink=4, recent=4, window=16, **options)  # noqa: B023
        histories = [causal.Dense(16) if options is None else make() for _ in model.readers]
        model.begin(histories)
        videos[name] = model.roll(noise, prompt, 2)
    assert torch.equal(videos["exact"], videos["dense"])
    assert torch.equal(videos["2"], videos["again"])
    assert torch.equal(videos["2"][:, :, :12], videos["dense"][:, :, :12]), "nothing is packed before"
    assert psnr(videos["2"], videos["dense"]) > 45
    assert all(history.packed == 8 and history.why == "" for history in histories)


def test_anyflow_far_has_no_object_to_put_in_and_is_refused():
    pytest.importorskip("diffusers")
    sys.path.append(str(Path(__file__).parent))
    import pipelines

    import tqai_core as tqai

    with pytest.raises(TqaiError, match="keeps no keys and values"):
        tqai.apply(pipelines.family("anyflow_far").pipe(), tqai.Config(level="kv"))
