"""TQAI Cache: on the fake host everywhere, on the cache nodes of real checkouts where COMFYUI_PATH names them."""

from __future__ import annotations

import gc
import json
import math
import sys
import weakref
from typing import Any

import caching
import pytest
import torch

KINDS = ("klein", "animate", "qwen21")


@pytest.fixture(scope="module")
def case(host):
    """A kind of cache by its name; skips where this host has none of it. Runs that several tests need are made once."""
    known, runs = caching.cases(host), {}

    def give(kind: str) -> caching.Case:
        if kind not in known:
            pytest.skip(f"{host.version} has no such cache node")
        return known[kind]

    def exact(kind: str, **kw: Any) -> torch.Tensor:
        """Under the host's own cache, uncompressed."""
        key = (kind, *sorted(kw.items()))
        if key not in runs:
            own = give(kind)
            runs[key] = own.draw(own.node(own.model()), **kw)
        return runs[key]

    give.exact = exact
    return give


@pytest.fixture
def packed(host):
    def put(model: Any, **over: Any) -> Any:
        inputs = {"bits_keys": "4", "bits_values": "4", "offload": False, "memory_budget": 1024, "enabled": True, "unique_id": "9"}
        return host.run("TQAICache", model=model, **{**inputs, **over}).result[0]

    return put


def db(x: torch.Tensor, exact: torch.Tensor) -> float:
    """Energy of the exact latent over that of the error."""
    wrong = float((x - exact).square().sum())
    return 10 * math.log10(float(exact.square().sum()) / wrong) if wrong else math.inf


def smaller(report: dict[str, Any]) -> float:
    return report["bytes_exact"] / report["bytes_held_peak"]


@pytest.mark.shows("TQAI Cache disabled: the host's cache, bit for bit")
@pytest.mark.parametrize("kind", KINDS)
def test_disabled_is_the_model_itself(case, packed, kind):
    own = case(kind)
    m = own.node(own.model())
    assert packed(m, enabled=False) is m
    on = packed(m)
    assert on is not m
    assert torch.equal(own.draw(m), case.exact(kind)), "the model that was cloned changed"
    own.draw(on, steps=3)
    assert torch.equal(own.draw(m), case.exact(kind)), "a packed run left something behind"


@pytest.mark.shows("TQAI Cache at 4 bits and at 8: dB to the uncompressed cache, times smaller than bf16; the node's own int8, int4")
@pytest.mark.parametrize("kind", KINDS)
def test_close_to_the_uncompressed_cache_and_small(host, case, packed, kind, record_property):
    """The same whether TQAI Cache stands before the cache node or after it, and again in a second run."""
    own, exact = case(kind), case.exact(kind)
    after = packed(own.node(own.model()))
    x, report = own.draw(after), host.report()
    assert report["fallbacks"] == []
    assert torch.equal(own.draw(after), x), "a second run differs"
    assert host.report()["per_site"] == report["per_site"]
    assert torch.equal(own.draw(own.node(packed(own.model()))), x), "before the cache node it is another result"
    finer = own.draw(packed(own.node(own.model()), bits_keys="8", bits_values="8"))
    assert db(finer, exact) >= db(x, exact) + 12
    told = [f"{kind} {db(x, exact):.1f}, {smaller(report):.2f}; at 8 bits {db(finer, exact):.1f}, {smaller(host.report()):.2f}"]
    assert smaller(report) >= (3.8 if host.real else 3.4)
    none = own.draw(own.model()) if kind == "klein" and host.real else None
    for dtype in own.dtypes[1:] if host.real else ():
        m = own.node(own.model(), dtype)
        cache, size = m.model_options["transformer_options"]["animate2_cache"], []
        free = cache.free
        cache.free = lambda cache=cache, size=size, free=free: (size.append(held(cache)), free())
        theirs = db(own.draw(m), exact)
        told.append(f"{dtype} {theirs:.1f}, {report['bytes_exact'] / size[0]:.2f}")
        if dtype == "int4":
            assert db(x, exact) > theirs, "no closer than the host's int4"
        else:  # its levels reach as far as each token needs, ours as far as a Gaussian one would
            assert db(finer, exact) > theirs - 1, "more than a decibel behind the host's int8"
    assert none is None or db(x, exact) >= db(none, exact) + 6, "as good as no cache node at all"
    record_property("figure", "; ".join(told))


def held(cache: Any) -> int:
    """Bytes of the host's own cache, its scales counted."""
    scales = [x for slot in cache.slots for p in slot["params"].values() for x in vars(p).values() if isinstance(x, torch.Tensor)]
    return cache.memory_bytes() + sum(x.numel() * x.element_size() for x in scales)


@pytest.mark.shows("TQAI Cache at 4 and 4 bits: times smaller than bf16, all counted")
@pytest.mark.parametrize(("kind", "dim", "least"), [("klein", 64, 3.6), ("klein", 128, 3.8), ("animate", 64, 3.6), ("animate", 128, 3.8)])
def test_the_bytes_at_heads_of_64_and_128(host, case, packed, kind, dim, least, record_property):
    own = case(kind)
    if not host.real:
        pytest.skip("the sizes of real models")
    setup = caching.klein(128 // dim) if kind == "klein" else caching.animate(256 if dim == 128 else 192)
    caching.drawn(setup)(packed(own.node(setup.model())), steps=1, cfg=1.0)
    report = host.report()
    assert report["fallbacks"] == []
    assert smaller(report) >= least
    record_property("figure", f"{kind}, {dim}: {smaller(report):.2f}")


def test_channels_of_outliers_do_less_harm_than_in_the_hosts_int4(host, case, record_property):
    """A hundred and twenty-five times the size in a few channels: the error of what a model reads of them, each in its own size."""
    case("animate")
    if not host.real:
        pytest.skip("the host's own codec")
    from comfy.ldm.wan.model_animate2 import PoseBranchCache

    from tqai_core.kv.activations import Activations

    x, size = torch.randn(1, 768, 256, generator=torch.Generator().manual_seed(0)), torch.ones(256)
    size[[3, 70, 200]] = 125.0
    theirs = PoseBranchCache(dtype="int4")
    theirs.select(torch.zeros(1, 1, 1, 1, 1))
    theirs.put(0, x * size)
    read = theirs.take(0, torch.device("cpu"), torch.float32, 1)
    ours = Activations.pack(x * size, 4)
    assert ours.nbytes <= 1.05 * held(theirs)
    assert db(ours.dense() / size, x) >= 19
    assert db(ours.dense() / size, x) >= db(read / size, x) + 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_tells_bytes_and_errors(host, case, packed, kind):
    own = case(kind)
    own.draw(packed(own.node(own.model()), bits_keys="6", bits_values="3"), steps=3)
    report = host.report()
    assert report["evaluations"] == 3
    assert 0 < report["bytes_held_peak"] < report["bytes_exact"]
    assert len(report["per_site"]) == (4 if kind == "klein" and host.real else 2)
    for row in report["per_site"].values():
        assert row["tokens"] >= 300
        assert 3 < row["bits_held"] < 8
        assert 0.003 < row["nmse_v"] < 0.06, "three bits"
        assert (row["nmse_k"], row["bits_k"]) == (None, None) if kind == "animate" else 1e-4 < row["nmse_k"] < 2e-3, "six bits"
    assert sum(row["bytes_held"] for row in report["per_site"].values()) == report["bytes_held_peak"]
    out = host.run("TQAIReport", unique_id="9", samples={"samples": torch.zeros(1, 16, 4, 4)})
    text, chart, data = out.result[1:4]
    assert ", cache" in text
    assert f"{report['bytes_held_peak']:,} B" in text
    assert "values" in text
    assert chart.min() < 0.5, "the chart shows the layers"
    assert json.loads(data)[0]["per_site"] == report["per_site"]


@pytest.mark.shows("TQAI Cache: nothing held after the end, an interrupt, an exception")
@pytest.mark.parametrize("ending", ["end", "exception", "interrupt"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_held_after_a_run(host, case, packed, kind, ending, monkeypatch):
    own = case(kind)
    m = own.node(own.model())
    on = packed(m)
    options = repr(sorted(on.model_options["transformer_options"]))
    clean, seen, peak = own.draw(on), [], []
    module = host.part("nodes.cache_patch")
    real = module.CacheRun
    monkeypatch.setattr(module, "CacheRun", lambda *args: seen.append(real(*args)) or seen[-1])

    def callback(step, x0, x, total):
        peak.append(seen[0].held)
        if step == 3 and ending == "interrupt":
            host.interrupt()
        if step == 3 and ending == "exception":
            raise KeyError("of the callback")

    if ending == "end":
        own.draw(on, callback=callback)
    else:
        with pytest.raises((KeyError, host.interrupted)):
            own.draw(on, callback=callback)
    assert max(peak) > 0
    assert seen[0].held == 0
    gone = [weakref.ref(store) for store in (seen[0], *seen[0].stores)]
    seen.clear()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone), "the caches are still referenced"
    assert options == repr(sorted(on.model_options["transformer_options"]))
    inner = on.model.diffusion_model
    assert "select_prefix_cache" not in vars(inner)
    assert torch.equal(own.draw(on), clean), "the run after it is not clean"
    assert torch.equal(own.draw(m), case.exact(kind)), "the host's own cache is not what it was"


@pytest.mark.shows("TQAI Cache and TQAI Compress on one model, in either order")
@pytest.mark.parametrize("kind", KINDS)
def test_with_tqai_compress(host, case, packed, kind):
    """Every second step is forecast; the rest read the packed cache. Two reports, one a node."""
    own = case(kind)
    found = []
    for order in ((packed, host.compress), (host.compress, packed)):
        m = own.node(own.model())
        for put in order:
            m = put(m, host.pipeline(), unique_id="7") if put is host.compress else put(m)
        found.append(own.draw(m, steps=16))
        entries = {e.patch: e.report for e in host.part("nodes.run_history").HISTORY.of({None, "7", "9"})}
        assert entries["7"]["calls_skipped"] > 0
        assert entries["7"]["fallbacks"] == entries["9"]["fallbacks"] == []
        assert 0 < entries["9"]["bytes_held_peak"] < entries["9"]["bytes_exact"] / 3
    assert torch.equal(*found)
    alone = own.draw(host.compress(own.node(own.model()), host.pipeline()), steps=16)
    assert db(found[0], alone) >= 20, "not what the unpacked cache gives under the same forecasts"


@pytest.mark.parametrize("kind", ["klein"])
def test_conditions_that_run_apart_do_not_mix(host, case, packed, kind, monkeypatch):
    """Each has its own reference. The host's own Flux KV Cache has one entry: split, the second reads what was kept of the first."""
    own = case(kind)
    m, fine = own.node(own.model()), {"bits_keys": "8", "bits_values": "8"}
    batched, exact = own.draw(packed(m, **fine), negative=own.other), own.draw(m, negative=own.other)
    split_memory(monkeypatch)
    ours, theirs = own.draw(packed(m, **fine), negative=own.other), own.draw(m, negative=own.other)
    assert db(ours, batched) >= 80, "the split changes the result"
    assert db(ours, exact) >= db(theirs, exact) + 6, "this host does not mix any more, or we do"


def split_memory(monkeypatch: Any) -> None:
    """One condition a forward."""
    memory = lambda device=None, torch_free_too=False: (1, 1) if torch_free_too else 1
    monkeypatch.setattr(sys.modules["comfy.model_management"], "get_free_memory", memory)


def test_two_pose_videos_in_one_batch_share_no_slot(host, case, packed):
    """The host compares the first one alone, and reads it for both. With ours such a step is computed."""
    own = case("animate")
    negative = caching.animate(seed=5).conds(2)
    m = own.model()
    exact = own.draw(m, steps=3, negative=negative)
    assert torch.equal(own.draw(packed(own.node(m)), steps=3, negative=negative), exact)
    assert "two pose videos in one batch" in host.report()["fallbacks"][0]["why"]
    assert db(own.draw(own.node(m), steps=3, negative=negative), exact) < 80, "this host does not mix any more"


@pytest.mark.parametrize("budget", [1024, 0])
def test_context_windows(host, case, packed, budget):
    """Each window has a slot of its own; over the budget all are computed, the window under way included."""
    own = case("animate")
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    windows = lambda m: ContextWindowsManualNode.execute(m, 3, 1, "standard_static", 1, False, "pyramid", 2, False).result[0]
    exact = own.draw(windows(own.node(own.model()) if budget else own.model()), steps=2)
    ours = own.draw(windows(packed(own.node(own.model()), bits_values="8", memory_budget=budget)), steps=2)
    assert db(ours, exact) >= 60
    assert len(host.report()["fallbacks"]) == (not budget)


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_budget_nothing_is_kept_and_all_is_computed(host, case, packed, kind):
    own = case(kind)
    m = own.model()
    on = own.draw(packed(own.node(m), memory_budget=0))
    report = host.report()
    assert "over the budget of 0 MB" in report["fallbacks"][0]["why"]
    assert len(report["fallbacks"]) == 1
    assert "each step computes it again" in report["fallbacks"][0]["why"]
    if kind == "klein":  # what that node changes besides is the time at which references are read
        exact = own.draw(own.node(m), steps=1)
        assert torch.equal(own.draw(packed(own.node(m), memory_budget=0), steps=1), exact)
        assert db(on, case.exact(kind)) > 20
    elif kind == "animate":
        assert torch.equal(on, own.draw(m)), "the pose branch at each step"
    else:
        assert db(on, case.exact(kind)) > 100, "what was kept is what is computed again"


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_rows_give_the_same(case, packed, kind):
    own = case(kind)
    on, off = (own.draw(packed(own.node(own.model()), offload=offload), steps=3) for offload in (True, False))
    assert torch.equal(on, off)


def test_over_the_budget_of_a_device_rows_move_to_the_host_first(host):
    """A device of which only the name is known here: what is asked of the caches, and in which order."""
    module = host.part("nodes.cache_run")
    run, asked = module.CacheRun(module.CacheSettings(4, 4, budget=1000), 1), []

    class Held:
        nbytes, numbers, tokens, why, error, device = 2000, 4000, 10, "", None, torch.device("meta")

    class Kept:
        layers = staticmethod(lambda: iter([("block.0", Held)]))
        offload = staticmethod(lambda: asked.append("offload"))
        stop = staticmethod(lambda: asked.append("stop"))
        drop = staticmethod(lambda: asked.append("drop"))

    run.stores.append(Kept)
    run.kept(Held)
    assert (asked, run.host, run.full) == (["offload"], True, False)
    run.kept(Held)
    assert (asked, run.full) == (["offload", "stop"], True)
    with run.evaluation():
        pass
    assert asked == ["offload", "stop", "drop"]
    assert [f["why"].partition(": ")[2] for f in run.report.fallbacks] == [
        "kept in CPU memory",
        "nothing is kept from here on, each step computes it again",
    ]


def test_the_hosts_own_bits_stay(host, case, packed):
    for kind, dtypes in (("animate", ("int8", "int4")), ("qwen21", ("int8",))):
        if kind not in caching.cases(host):
            continue
        own = case(kind)
        for dtype in dtypes:
            theirs = own.draw(own.node(own.model(), dtype))
            assert torch.equal(own.draw(packed(own.node(own.model(), dtype))), theirs)
            assert [f["why"] for f in host.report()["fallbacks"]] == [
                f"the cache node's dtype is {dtype}: left to it; set it to default to have it packed here"
            ]
            assert host.report()["per_site"] == {}


@pytest.mark.shows("TQAI Cache on a model without a cache: nothing changes, and the report says so")
def test_without_a_cache_node_nothing_changes(host, packed):
    m = host.load("sd3")
    assert torch.equal(host.sample(packed(m), "sd3"), host.sample(m, "sd3"))
    (why,) = [f["why"] for f in host.report()["fallbacks"]]
    assert "keeps nothing from step to step" in why
    assert "Flux KV Cache" in why


def test_two_cache_nodes_are_a_clear_error(host, packed):
    once = packed(host.load("sd3"))
    with pytest.raises(ValueError, match="already went through TQAI Cache"):
        packed(once)


def test_the_live_panel_hears_of_it(host, case, packed):
    kind = next(iter(caching.cases(host)), None)
    if kind is None or host.real:
        pytest.skip("no cache on this host, or no fake server")
    host.sent.clear()
    case(kind).draw(packed(case(kind).node(case(kind).model()), unique_id="77"), steps=4)
    assert [data["node"] for _, data in host.sent] == ["77"] * 5
    last = host.sent[-1][1]
    assert (last["cache"], last["state"], last["step"], last["total"], last["layers"]) == (True, "packed", 4, 4, 2)
    assert last["bytes"] == 0 < last["peak"] < last["exact"]
    assert 0 < last["nmse_k"] < 0.02
    assert max(data["bytes"] for _, data in host.sent) == last["peak"]
    json.dumps(host.sent)
