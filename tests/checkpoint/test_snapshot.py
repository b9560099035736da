"""What is in host memory is a file that anything can read, and each piece is stored once."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from dtr_scale.checkpoint.layout import Piece
from dtr_scale.checkpoint.snapshot import Snapshot, own_share
from dtr_scale.engines.world import World


@given(numels=st.lists(st.integers(0, 50), max_size=6), name=st.text(max_size=8))
def test_a_snapshot_is_a_plain_safetensors_file(numels, name):
    """Without this package or pickle, whatever the names and sizes."""
    pieces = {
        f"ema/{name}{i}": Piece((numel,), 0, torch.randn(numel)) for i, numel in enumerate(numels)
    }
    snapshot = Snapshot(pieces)
    snapshot.take(pieces)
    tensors = load(bytes(snapshot.data))
    assert tensors.keys() == pieces.keys()
    assert all(torch.equal(tensors[key], piece.data) for key, piece in pieces.items())
    entry = snapshot.entry("f")
    assert entry["bytes"] == len(snapshot.data)
    assert all(place["start_byte"] % 4 == 0 for place in entry["pieces"].values())


def test_the_memory_is_kept_and_filled_anew():
    pieces = {"ema/w": Piece((3,), 0, torch.zeros(3))}
    snapshot = Snapshot(pieces)
    snapshot.take(pieces)
    data = snapshot.data
    pieces["ema/w"].data.fill_(5.0)
    assert load(bytes(data))["ema/w"].tolist() == [0.0] * 3
    snapshot.take(pieces)
    assert load(bytes(data))["ema/w"].tolist() == [5.0] * 3


class Told(World):
    """A rank that is told what the others say."""

    others: list[list]

    def all_gather_object(self, value):
        return self.others


def test_replicas_are_spread_and_nothing_is_stored_twice():
    """Two replicas of a tensor cut in two, one that all hold, and ranks that hold nothing of it."""

    def state(rank):
        first = rank % 2 * 6
        return {
            "master/cut": Piece((12,), first, torch.zeros(6)),
            **{f"objective/{i}": Piece((6,), 0, torch.zeros(6)) for i in range(2)},
            "master/short": Piece((1,), min(rank, 1), torch.zeros(1 if rank == 0 else 0)),
            "master/empty_here": Piece((4,), 0, torch.zeros(4 if rank == 3 else 0)),
        }

    worlds = [Told(rank, rank, 4, torch.device("cpu")) for rank in range(4)]
    said = []
    for world in worlds:
        object.__setattr__(world, "others", said)
        said.append({(key, p.offset, p.data.numel()): None for key, p in state(world.rank).items()})
    shares = [own_share(state(world.rank), world) for world in worlds]
    stored = [
        (key, piece.offset, piece.data.numel()) for share in shares for key, piece in share.items()
    ]
    stored = sorted(place for place in stored if place[2])
    assert stored == [
        ("master/cut", 0, 6), ("master/cut", 6, 6), ("master/empty_here", 0, 4),
        ("master/short", 0, 1), ("objective/0", 0, 6), ("objective/1", 0, 6),
    ]  # fmt: skip
    loads = [sum(piece.data.numel() for piece in share.values()) for share in shares]
    assert max(loads) <= 10


def test_one_rank_stores_everything():
    state = {"a": Piece((2,), 0, torch.zeros(2))}
    assert own_share(state, World(0, 0, 1, torch.device("cpu"))) == state
