"""What every host of models has: the table, and the handle's undo."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tqai_core as tqai
from tqai_core.errors import TqaiError
from tqai_core.hosts import HOSTS
from tqai_core.hosts.language import layer_plans


def test_each_host_takes_its_librarys_objects_alone():
    def library(name):
        return type("Model", (type("Base", (), {"__module__": f"{name}.models.base"}),), {"__module__": "my.own"})()

    for host in HOSTS:
        assert [other.library for other in HOSTS if other.takes(library(host.library))] == [host.library]
    assert not any(host.takes(library("diffusersx")) for host in HOSTS)


def test_what_no_host_takes_is_refused_with_what_they_take():
    with pytest.raises(TqaiError, match=r"cannot apply tqai to a Linear: give one of a diffusers pipeline .* mlx-lm"):
        tqai.apply(torch.nn.Linear(2, 2))


def test_undos_run_last_first():
    """Two changes of one attribute: the undo of the second leaves what the first had put there."""
    thing, handle = SimpleNamespace(attention="sdpa"), tqai.Handle()
    for new in ("ours", "ours, wrapped"):
        handle.on_remove(lambda was=thing.attention: setattr(thing, "attention", was))
        thing.attention = new
    with handle:
        assert thing.attention == "ours, wrapped"
    assert thing.attention == "sdpa"
    thing.attention = "another"
    handle.remove()
    assert thing.attention == "another", "a second remove changes nothing"


def test_every_layer_has_a_plan_or_a_reason():
    config = tqai.Config(level="kv", codec="turbo:bits_k=4,bits_v=3", skip_layers=(1,), protect=1)
    plans = layer_plans(config, ["", "", *[""] * 8, "RotatingKVCache"])
    assert plans[1] == "skip_layers"
    assert plans[10] == "RotatingKVCache keeps its own form"
    assert [(plan.bits_k, plan.bits_v) for plan in (plans[0], plans[2], plans[9])] == [(8, 8), (4, 3), (8, 8)]
    assert layer_plans(tqai.Config(level="kv", codec="exact"), ["", "Other"]) == ["codec exact"] * 2
