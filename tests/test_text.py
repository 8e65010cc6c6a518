"""Helpers that the command and the hosts share: lists, lines, layers, files."""

from __future__ import annotations

import argparse

import pytest
import torch

import tqai_core as tqai
from tqai_core.arguments import comma_list, lines_in
from tqai_core.errors import TqaiError
from tqai_core.files import once_per_version, read_tensors, write_tensors
from tqai_core.layers import exact_layers
from tqai_core.text import first_line


def test_lists_and_lines(tmp_path):
    assert comma_list(str)("flux, wan,") == ("flux", "wan")
    assert comma_list(float)("1,2.5") == (1.0, 2.5)
    with pytest.raises(argparse.ArgumentTypeError, match="'1,x' is not a list of int"):
        comma_list(int)("1,x")
    (tmp_path / "t").write_text("\ufeff a \n\n b\n", encoding="utf-8")
    assert lines_in(str(tmp_path / "t")) == ["a", "b"]
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"


def test_layers_by_number_and_name():
    blocks = ["blocks.0", "blocks.1", "blocks.2"]
    assert exact_layers((0, -1, "blocks.1"), blocks, "this model") == ({0, 1, 2}, set())
    assert exact_layers(("attn.1",), blocks, "this model", modules=("attn.1",)) == (set(), {"attn.1"})
    assert exact_layers(("model.layers.2.mlp",), blocks, "this model", by_number=True) == ({2}, set())
    for wrong, numbers in ((3, False), (-4, False), ("model.layers.2", False), ("model.layers.3", True)):
        with pytest.raises(TqaiError, match=r"asked, but this model has 3 layers: use 0 to 2, -3 to -1, or a name such as 'blocks\.0'"):
            exact_layers((wrong,), blocks, "this model", noun="layers", by_number=numbers)


def test_a_file_is_read_again_when_it_changed(tmp_path):
    path, reads = tmp_path / "deep" / "x.safetensors", []

    @once_per_version
    def read(path):
        reads.append(path)
        return read_tensors(path, what="file", again="write it again")[1]["x"]

    write_tensors(path, {"x": torch.zeros(2)}, {})
    assert torch.equal(read(str(path)), read(str(path)))
    assert len(reads) == 1
    write_tensors(path, {"x": torch.ones(2)}, {})
    assert torch.equal(read(str(path)), torch.ones(2))
    assert not list(path.parent.glob("*.part"))
    path.write_bytes(b"nothing")
    with pytest.raises(TqaiError, match=r"not a readable file .*: write it again"):
        read(str(path))


def test_a_packed_tensor_from_its_file_and_its_bytes(tmp_path):
    packed = tqai.codec("turbo:bits=3").encode(torch.randn(6, 20, generator=torch.Generator().manual_seed(0)))
    packed.write(tmp_path / "p.safetensors")
    blob = (tmp_path / "p.safetensors").read_bytes()
    for again in (tqai.Packed.read(tmp_path / "p.safetensors"), tqai.Packed.from_bytes(blob)):
        assert again.codec == packed.codec
        assert torch.equal(tqai.codec(again.codec).decode(again), tqai.codec(packed.codec).decode(packed))
    (tmp_path / "cut").write_bytes(blob[:-3])
    for read in (lambda: tqai.Packed.read(tmp_path / "cut"), lambda: tqai.Packed.from_bytes(blob[:-3])):
        with pytest.raises(TqaiError, match="save the tensor again"):
            read()
