"""Any piece is read from any cut of a tensor into blocks and files, and nothing else is read."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtr_scale.checkpoint import layout
from dtr_scale.checkpoint.layout import COMPLETE, INDEX, rank_file
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.checkpoint.snapshot import Snapshot
from dtr_scale.engines.base import Piece
from dtr_scale.errors import ConfigError, DamagedCheckpointError
from dtr_scale.storage.folder import open_folder

VALUES = torch.randn(100, generator=torch.Generator().manual_seed(0))


def store(folder, *pieces_of_ranks):
    """Write a checkpoint whose ranks hold these pieces."""
    entries = []
    for rank, pieces in enumerate(pieces_of_ranks):
        snapshot = Snapshot(pieces)
        snapshot.take(pieces)
        entries.append(snapshot.entry(rank_file(rank)))
        folder.write_bytes(rank_file(rank), snapshot)
    index = layout.build_index(entries, {"step": 1})
    folder.write_bytes(INDEX, index)
    folder.write_bytes(COMPLETE, layout.complete_mark(index))
    return CheckpointReader(folder)


@settings(deadline=None)  # files and threads
@given(
    cuts=st.lists(st.integers(0, 100), max_size=5),
    start=st.integers(0, 99),
    length=st.integers(0, 100),
    block_bytes=st.sampled_from([16, 64, 4096]),
)
def test_any_range_is_read_from_any_cut_of_a_tensor(
    tmp_path_factory, cuts, start, length, block_bytes
):
    """Pieces stored by ranks that cut a tensor anywhere give every range of it back."""
    length = min(length, 100 - start)
    edges = itertools.pairwise(sorted([0, 100, *cuts]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "BLOCK_BYTES", block_bytes)
        reader = store(
            open_folder(tmp_path_factory.mktemp("cut")),
            *({"master/w": Piece((10, 10), first, VALUES[first:last])} for first, last in edges),
        )
    piece = Piece((10, 10), start, torch.zeros(length))
    reader.read_into({"master/w": piece})
    assert torch.equal(piece.data, VALUES[start : start + length])
    assert torch.equal(reader.read(["master/w"])["master/w"], VALUES.view(10, 10))


def test_only_the_blocks_that_are_needed_are_read_and_each_once(folder, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK_BYTES", 64)
    reader = store(
        folder, {f"master/{name}": Piece((100,), 0, VALUES + ord(name)) for name in "ab"}
    )
    read, read_into = [], type(folder).read_into

    def spy(self, name, start, buffers):
        read.append(start // 64)
        read_into(self, name, start, buffers)

    monkeypatch.setattr(type(folder), "read_into", spy)
    pieces = {
        "master/b": Piece((100,), 0, torch.zeros(10)),
        "master/a": Piece((100,), 90, torch.zeros(10)),
    }
    reader.read_into(pieces)
    assert torch.equal(pieces["master/a"].data, VALUES[90:] + ord("a"))
    assert torch.equal(pieces["master/b"].data, VALUES[:10] + ord("b"))
    assert len(set(read)) == len(read) <= 3


def test_damage_matters_only_to_whom_it_hits(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "BLOCK_BYTES", 64)
    folder = open_folder(tmp_path)
    reader = store(folder, {"master/w": Piece((100,), 0, VALUES)})
    data = bytearray(folder.read_bytes(rank_file(0)))
    data[-1] ^= 1
    folder.write_bytes(rank_file(0), bytes(data))
    piece = Piece((100,), 0, torch.zeros(50))
    reader.read_into({"master/w": piece})
    assert torch.equal(piece.data, VALUES[:50])
    data[200] ^= 1  # the first block that holds values
    folder.write_bytes(rank_file(0), bytes(data))
    with pytest.raises(DamagedCheckpointError, match=r"is damaged in bytes 192 to 256"):
        reader.read(["master/w"])
    data[200] ^= 1
    folder.write_bytes(rank_file(0), bytes(data))
    last = len(data) // 64 * 64
    with pytest.raises(DamagedCheckpointError, match=rf"is damaged in bytes {last} to {len(data)}"):
        reader.read(["master/w"])


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    reader = store(open_folder(tmp_path), {"ema/w": Piece((100,), 0, VALUES)})
    with pytest.raises(ConfigError, match="of another network: it has no ema/v"):
        reader.read(["ema/w", "ema/v"])


def test_elements_that_no_rank_stored_are_missed(tmp_path):
    reader = store(open_folder(tmp_path), {"ema/w": Piece((100,), 0, VALUES[:60])})
    with pytest.raises(DamagedCheckpointError, match="holds 60 of 100 elements of ema/w"):
        reader.read(["ema/w"])
