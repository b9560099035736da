"""Copies of the state where memory is short."""

import torch
from safetensors.torch import load

from dtr_scale.checkpoint import snapshot
from dtr_scale.checkpoint.layout import Piece
from dtr_scale.checkpoint.snapshot import Snapshot, available_memory


def test_where_memory_is_short_the_copy_lies_in_a_file(monkeypatch, caplog):
    state = {"master/a": Piece((1000,), 0, torch.randn(1000))}
    in_memory = Snapshot(state)
    monkeypatch.setattr(snapshot, "available_memory", lambda: 5000)
    with caplog.at_level("INFO"):
        in_file = Snapshot(state)
    assert "memory is short" in caplog.text
    for each in (in_memory, in_file):
        each.take(state)
        assert torch.equal(load(bytes(each.data))["master/a"], state["master/a"].data)
    assert in_memory.entry("f") == in_file.entry("f")


def test_there_is_memory():
    assert 10**8 < available_memory() < 10**14
