from __future__ import annotations

import json

import pytest
import torch
from bench import stream_report
from bench.stream_report import BITS, CONFIGS, Plain, Reuse, Tiered, coder, fading, restless, run, scorer, verdicts

from tqai_core.report import dumps
from tqai_core.types import Step, nbytes, tensors_in


def steps_of(n):
    return [Step(i, 1 - i / n, n, i == n - 1) for i in range(n)]


def test_streams_are_the_same_for_every_row():
    assert all(torch.equal(a, b) for a, b in zip(fading(2, 64, 3), fading(2, 64, 3), strict=True))
    assert not torch.equal(fading(2, 64, 3)[0], fading(2, 64, 4)[0])
    moved = [(b - a).square().mean(-1) for a, b in zip(restless(2, 64, 0), restless(2, 64, 0)[1:], strict=False)]
    assert float(moved[0].max() / moved[0].min()) > 20, "some tokens are restless"


def test_there_are_ten_and_each_decodes_from_what_was_sent_alone():
    assert len(CONFIGS) == 10
    steps = fading(2, 64, 0)
    for name, config in CONFIGS.items():
        one = coder(config)
        sent = [one.encode(x, step) for x, step in zip(steps, steps_of(5), strict=True)]
        assert one.bytes_sent == sum(
            nbytes(list(tensors_in(p.tensors))) for s in sent if s is not None for p in (s if isinstance(s, list) else [s])
        ), name
        again = coder(config).decode(sent, steps[0].shape)
        for x, y in zip(steps, again, strict=True):
            assert float((x - y).square().mean()) < 0.05, name


@pytest.mark.parametrize("name", ["palm+delta", "snr+delta2", "sheaf+delta2", "palm+tiered"])
def test_twenty_payload_bits_reach_one_in_ten_thousand(name):
    assert sum(BITS) == 20
    rows = [run(lambda: coder(CONFIGS[name]), fading(4, 128, seed)) for seed in range(2)]
    assert max(r["nmse"] for r in rows) <= 1.0e-4
    assert max(r["bits"] for r in rows) <= 4.2, "20 bits over five steps, and a tenth of a bit of side information"


def test_tiers_pay_where_the_score_carries_signal_and_stand_aside_where_not():
    steps = restless(4, 64, 0)
    uniform = run(lambda: Plain("delta", BITS), steps)
    for name, least, most in (("change", 0.0, 0.5), ("palm", 0.0, 0.8), ("random", 0.9, 1.1)):
        tiered = run(lambda name=name: Tiered(scorer(name)), steps)
        assert tiered["sent"] <= uniform["sent"], name
        assert least <= tiered["nmse"] / uniform["nmse"] <= most, name
    alike = fading(4, 64, 0)
    plain = run(lambda: Plain("delta", BITS), alike)
    for name in ("change", "palm", "sheaf", "bsa"):
        assert run(lambda name=name: Tiered(scorer(name)), alike)["nmse"] <= plain["nmse"] * 1.03, name


def test_tiers_decode_as_the_encoder_believes():
    steps, one = restless(3, 64, 1), Tiered(scorer("change"))
    sent = [one.encode(x, step) for x, step in zip(steps, steps_of(5), strict=True)]
    assert one.moved > 0
    last = Tiered(scorer("change")).decode(sent, steps[0].shape)[-1]
    assert torch.equal(last.reshape(-1, 64), one.value)
    assert one.nbytes == one.value.numel() * 4


def test_reuse_sends_once_and_shows_its_error():
    steps = fading(2, 64, 0)
    row = run(Reuse, steps)
    assert row["skipped"] == 4
    assert row["sent"] < run(lambda: Plain("delta", BITS), steps)["sent"] / 2
    assert 0.005 < row["nmse"] < 0.02
    assert run(lambda: Reuse(similarity=0.9999), steps)["skipped"] == 0
    assert row["held"] == steps[0].numel() * 4


def test_a_monitor_sends_predictions_alone_while_they_are_good():
    still = [fading(2, 64, 0)[0]] * 5
    from tqai_core.registry import build

    monitor = build("monitor", "lyapunov:tau=0.03,warmup=1,min_steps=1")
    watched, plain = run(lambda: Plain("choice", BITS, monitor), still), run(lambda: Plain("choice", BITS), still)
    assert watched["skipped"] >= 2
    assert watched["sent"] < plain["sent"]
    assert watched["nmse"] < 1e-4


def test_the_report(monkeypatch):
    monkeypatch.setattr(stream_report, "SHAPES", {"small": (2, 64), "wide": (1, 128)})

    def few(seeds, tell):
        steps = restless(2, 64, 0)
        uniform, tiered = run(lambda: Plain("delta", BITS), steps), run(lambda: Tiered(scorer("change")), steps)
        return [{
            "data": "restless tokens planted", "scorer": "change", "uniform": uniform["nmse"], "tiered": tiered["nmse"], "moved": 0.5,
            "ratio": tiered["nmse"] / uniform["nmse"], "bytes": tiered["sent"] / uniform["sent"], "signal": True,
        }]  # fmt: skip

    monkeypatch.setattr(stream_report, "_scorers", few)
    result = stream_report.bench([0, 1], peers=False)
    data = json.loads(dumps(result))
    assert all(r["held"] > 0 and r["sent"] > 0 for r in data["rows"])
    assert {r["shape"] for r in data["rows"]} == {"small", "wide"}
    assert data["verdicts"] == verdicts(result)
    assert all(v["ok"] for v in data["verdicts"])
    base = stream_report.table(result["rows"])[0]
    assert base["config"] == "baseline"
    assert base["versus"] == 0
    assert [r["shape"] for r in stream_report.best(result["rows"])] == ["small", "wide"]
    for _, head, body in stream_report.tables_of(result):
        assert all(len(line) == len(head) for line in body)
    worse = result | {"rows": [r | {"nmse": r["nmse"] * 10} for r in result["rows"]]}
    assert not verdicts(worse)[0]["ok"], "a promise can fail"


def test_upstream_is_measured_beside_when_it_is_there():
    measure, missing = stream_report._upstream()
    if measure is None:
        assert "pip install" in missing["tqai 0.6 (upstream)"]
        return
    steps = fading(2, 64, 0)
    plain, delta = measure({}, steps), measure(CONFIGS["palm+delta"], steps)
    assert delta["nmse"] < plain["nmse"]
    assert delta["held"] > delta["raw16"] * 2, "it keeps the raw tensor"
    assert measure(CONFIGS["palm+tiered"], steps)["nmse"] == plain["nmse"], "its scores change nothing"


def test_the_shipped_result_names_its_machine_and_its_promises_are_recomputed(root):
    result = json.loads((root / "benchmarks/results/stream_report.json").read_text())
    assert result["machine"]["threads"] == 1
    assert set(result["rows"][0]) >= {"nmse", "cosine", "ms", "held", "sent", "upstream"}
    assert result["verdicts"] == verdicts(result)
    assert all(v["ok"] for v in result["verdicts"])
