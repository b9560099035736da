"""A rank's file as a copy of the state, and read from the state where memory is short."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from dtr_scale.checkpoint import snapshot
from dtr_scale.checkpoint.manager import CheckpointManager
from dtr_scale.checkpoint.snapshot import (
    Snapshot,
    available_memory,
    have_room,
    own_share,
    share_out,
)
from dtr_scale.engines.base import Piece
from dtr_scale.engines.world import World

STATE = {
    "master/a": Piece((1000,), 0, torch.randn(1000)),
    "ema/b": Piece((20, 3), 5, torch.randn(50)),
}


@pytest.fixture(scope="module")
def both():
    """The file as a copy, and as it is read from the state."""
    held = Snapshot(STATE), Snapshot(STATE, copied=False)
    for each in held:
        each.take(STATE)
    return held


def test_without_a_copy_the_file_is_the_same(both):
    copied, read = both
    assert (copied.is_copy, read.is_copy) == (True, False)
    assert bytes(copied[:]) == bytes(read[:])
    assert torch.equal(load(bytes(read[:]))["ema/b"], STATE["ema/b"].data)
    assert copied.entry("f") == read.entry("f")


@given(st.integers(0, 6000), st.integers(0, 6000))
def test_any_slice_is_that_of_the_whole(both, start, stop):
    for held in both:
        assert bytes(held[start:stop]) == bytes(both[0][:])[start:stop]


class OtherNodes(World):
    """A world where ranks 1 and 2 are elsewhere, each with a copy of 4200 bytes to make."""

    places = ("here", "there", "there")

    def all_gather_object(self, value):
        return [(place, *value[1:]) for place in self.places]


@pytest.mark.parametrize(("free", "enough"), [(9000, False), (16_000, False), (17_000, True)])
def test_the_ranks_of_each_node_share_its_memory(free, enough, monkeypatch, warnings_of):
    monkeypatch.setattr(snapshot, "available_memory", lambda: free)
    world = OtherNodes(rank=0, local_rank=0, world_size=3, device=torch.device("cpu"))
    assert have_room(STATE, world) is enough
    told = warnings_of("dtr_scale.checkpoint.snapshot")
    assert enough or "training will stand still" in told[0]
    assert not enough or not told


def test_a_save_without_a_copy_is_stored_when_it_returns(folder, monkeypatch):
    monkeypatch.setattr(snapshot, "available_memory", lambda: 0)
    world = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    manager = CheckpointManager(folder, world=world)
    state = {key: Piece(p.shape, p.offset, p.data.clone()) for key, p in STATE.items()}
    manager.save(1, state, {"step": 1})
    assert manager.saved_step == 1
    for piece in state.values():
        piece.data.zero_()
    plan = manager.load_newest(state)
    assert plan is not None
    assert plan.reader.meta == {"step": 1}
    for key, piece in state.items():
        assert torch.equal(piece.data, STATE[key].data)


def test_there_is_memory():
    assert 10**8 < available_memory() < 10**14


places = st.tuples(st.sampled_from("abcdef"), st.integers(0, 3), st.integers(1, 50))
ranks_places = st.lists(st.lists(places, unique=True, max_size=12), min_size=1, max_size=6)


@given(ranks_places)
def test_each_piece_is_stored_once_by_a_rank_that_holds_it(held):
    owners = share_out(held)
    assert owners.keys() == {place for of_rank in held for place in of_rank}
    assert all(place in held[rank] for place, rank in owners.items())


@given(st.lists(places, unique=True), st.integers(1, 8))
def test_replicas_are_spread_evenly(replicated, num_ranks):
    load = [0] * num_ranks
    for place, rank in share_out([replicated] * num_ranks).items():
        load[rank] += place[2]
    largest = max((place[2] for place in replicated), default=0)
    assert max(load) - min(load) <= largest


class Gathered(World):
    """One of 256 ranks, each with its own range of the same tensors and replicas of one."""

    def all_gather_object(self, value):
        own = [[(key, rank, 1) for key in "abc"] for rank in range(self.world_size)]
        return [[*places, ("replica", 0, 1)] for places in own]


def test_a_rank_stores_its_own_ranges_and_its_share_of_replicas():
    data = torch.zeros(1)
    stored = []
    for rank in range(256):
        world = Gathered(rank=rank, local_rank=0, world_size=256, device=torch.device("cpu"))
        state = {key: Piece((256,), rank, data) for key in "abc"}
        stored.append(set(own_share(state | {"replica": Piece((1,), 0, data)}, world)))
    assert sorted(map(len, stored)) == [3] * 255 + [4]
