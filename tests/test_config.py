from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tqai_core as tqai
from tqai_core.config import PRESETS, TAUS
from tqai_core.registry import REGISTRY, build, param


def test_pipeline_dict_and_kwargs():
    config = tqai.Config.from_dict(
        {"scorer": "snr", "strategy": "delta2", "monitor": "lyapunov", "monitor_kwargs": {"tau": 0.1}, "skip_layers": [1, 0]}
    )
    assert config.monitor == "lyapunov:tau=0.1"
    assert config.skip_layers == (0, 1)
    assert config == tqai.Config(scorer="snr", monitor={"name": "lyapunov", "tau": 0.1}, skip_layers=(0, 1))
    assert hash(config) == hash(tqai.Config.from_json(config.to_json()))


@given(
    tau=st.floats(0, 10),
    bits=st.integers(1, 8),
    layers=st.lists(st.integers(-5, 5), max_size=4),
    scorer=st.sampled_from([None, "none", "snr", "snr:schedule=cosine", {"name": "snr", "schedule": "linear"}]),
    strategy=st.sampled_from([None, "delta", "delta2", "delta2:slope_bits=2"]),
)
def test_json_round_trip(tau, bits, layers, scorer, strategy):
    config = tqai.Config(
        scorer=scorer, strategy=strategy, monitor={"name": "lyapunov", "tau": tau}, codec=f"turbo:bits={bits}", skip_layers=tuple(layers)
    )
    again = tqai.Config.from_json(config.to_json())
    assert again == config
    assert build("monitor", again.monitor).tau == tau


def test_presets_differ_and_name_the_known():
    assert len({tqai.preset(name, family).to_json() for name in PRESETS for family in TAUS[name]}) > 1
    with pytest.raises(ValueError, match="quality, balanced, fast"):
        tqai.preset("best")
    with pytest.raises(ValueError, match=r"flux, .*sd3, .*wan"):
        tqai.preset("fast", family="sdxl")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: tqai.Config(scorer="palmm"), ["palmm", "known", "snr"]),
        (lambda: tqai.Config(monitor="lyapunov:tua=1"), ["tua", "tau"]),
        (lambda: tqai.Config(monitor="lyapunov:tau=high"), ["tau", "high"]),
        (lambda: tqai.Config(monitor="lyapunov:tau"), ["tau", "="]),
        (lambda: tqai.Config(monitor="lyapunov:tau=-1"), ["tau", "range", "0"]),
        (lambda: tqai.Config(scorer="snr:schedule=cubic"), ["cubic", "linear", "cosine"]),
        (lambda: tqai.codec("turbo:bits=0"), ["bits=0", "1", "8"]),
        (lambda: tqai.codec("turbo:bits=9"), ["bits=9", "1", "8"]),
        (lambda: tqai.codec("turbo:bits=2.5"), ["bits", "2.5"]),
        (lambda: tqai.codec({"name": "turbo", "bits": 2.5}), ["bits", "2.5"]),
        (lambda: tqai.codec({"bits": 2}), ["name"]),
        (lambda: tqai.Config(level="kernel"), ["kernel", "model"]),
        (lambda: tqai.Config(skip_layers=("a b",)), ["skip_layers"]),
        (lambda: tqai.Config(version=99), ["99", "upgrade"]),
        (lambda: tqai.Config.from_dict({"version": 2, "future": 1}), ["version 2", "upgrade"]),
        (lambda: tqai.Config.from_dict({"scorrer": "snr"}), ["scorrer", "scorer"]),
        (lambda: tqai.Config.from_dict({"scorer": None, "scorer_kwargs": {"schedule": "linear"}}), ["scorer_kwargs"]),
        (lambda: tqai.Config.from_dict([1]), ["dict", "list"]),
        (lambda: tqai.Config.from_json("{"), ["JSON"]),
        (lambda: tqai.Config(scorer=7), ["7"]),
        (lambda: tqai.Config(scorer=build("monitor", "fixed")), ["fixed", "monitor", "scorer"]),
    ],
)
def test_bad_input_says_what_and_the_cure(make, words):
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_frozen():
    with pytest.raises(AttributeError):
        tqai.Config().scorer = "snr"


@pytest.mark.parametrize("role", list(REGISTRY))
def test_every_method_round_trips_and_explains_itself(role, fisher_file):
    for name, cls in REGISTRY[role].items():
        spec = f"fisher:file={fisher_file}" if name == "fisher" else name
        assert build(role, spec).spec == spec
        assert len(cls.summary()) > 40, f"{name} has no help"
        for key, option in cls.options().items():
            assert option["help"], f"{name}: {key} has no help"
        json.dumps({k: o["default"] for k, o in cls.options().items()})


def test_two_methods_cannot_share_a_name():
    from dataclasses import dataclass

    from tqai_core.roles import StepScorer as Scorer

    with pytest.raises(ValueError, match="already taken"):

        @dataclass(frozen=True)
        class Other(Scorer, name="snr"):
            x: int = param(1, "x")
