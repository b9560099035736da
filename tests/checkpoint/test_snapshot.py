"""A rank's file as a copy of the state, and read from the state where memory is short."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from dtr_scale.checkpoint import snapshot
from dtr_scale.checkpoint.layout import Piece
from dtr_scale.checkpoint.manager import CheckpointManager
from dtr_scale.checkpoint.snapshot import Snapshot, available_memory
from dtr_scale.engines.world import World

STATE = {
    "master/a": Piece((1000,), 0, torch.randn(1000)),
    "ema/b": Piece((20, 3), 5, torch.randn(50)),
}


def taken(free_bytes, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(snapshot, "available_memory", lambda: free_bytes)
        held = Snapshot(STATE)
    held.take(STATE)
    return held


def test_where_memory_is_short_the_file_is_the_same(monkeypatch, warnings_of):
    copied = taken(10**9, monkeypatch)
    assert warnings_of("dtr_scale.checkpoint.snapshot") == []
    read = taken(5000, monkeypatch)
    assert "training will stand still" in warnings_of("dtr_scale.checkpoint.snapshot")[0]
    assert (copied.is_copy, read.is_copy) == (True, False)
    assert bytes(copied[:]) == bytes(read[:])
    assert torch.equal(load(bytes(read[:]))["ema/b"], STATE["ema/b"].data)
    assert copied.entry("f") == read.entry("f")


@pytest.fixture(scope="module")
def both():
    """The file as a copy, and as it is read where memory is short."""
    with pytest.MonkeyPatch.context() as patched:
        return taken(10**9, patched), taken(0, patched)


@given(st.integers(0, 6000), st.integers(0, 6000))
def test_any_slice_is_that_of_the_whole(both, start, stop):
    for held in both:
        assert bytes(held[start:stop]) == bytes(both[0][:])[start:stop]


def test_ranks_of_a_node_share_its_memory(monkeypatch):
    monkeypatch.setattr(snapshot, "available_memory", lambda: 20_000)
    assert Snapshot(STATE).is_copy
    assert not Snapshot(STATE, sharers=3).is_copy


def test_a_save_without_a_copy_is_stored_when_it_returns(folder, monkeypatch):
    monkeypatch.setattr(snapshot, "available_memory", lambda: 0)
    world = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    manager = CheckpointManager(folder, world=world)
    state = {key: Piece(p.shape, p.offset, p.data.clone()) for key, p in STATE.items()}
    manager.save(1, state, {"step": 1})
    assert manager.saved_step == 1
    for piece in state.values():
        piece.data.zero_()
    assert manager.restore(state) == {"step": 1}
    for key, piece in state.items():
        assert torch.equal(piece.data, STATE[key].data)


def test_there_is_memory():
    assert 10**8 < available_memory() < 10**14
