"""Checkpoints appear whole or not at all, and a damaged one is never loaded."""

import itertools
import json
import resource

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtr_scale.checkpoint import layout
from dtr_scale.checkpoint.layout import COMPLETE, INDEX, CheckpointReader, Piece, write_rank_file
from dtr_scale.checkpoint.manager import UNFINISHED, CheckpointManager
from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.storage import Folder

LONE = World(0, 0, 1, torch.device("cpu"))
PART = "rank_00000.safetensors"


def state_of(value: float) -> dict[str, Piece]:
    value = float(value)
    return {
        "master/a": Piece((3, 4), 0, torch.arange(12.0) + value),
        "ema/a": Piece((3, 4), 0, torch.full((12,), value)),
        "objective/step": Piece((), 0, torch.tensor([value])),
    }


def manager_of(folder, *, keep_last=3, keep_every=0):
    return CheckpointManager(folder, world=LONE, keep_last=keep_last, keep_every=keep_every)


def assert_holds(state, value):
    expected = state_of(value)
    assert all(torch.equal(piece.data, expected[key].data) for key, piece in state.items())


def test_what_is_saved_is_restored(folder):
    manager = manager_of(folder)
    state = state_of(0.0)
    assert manager.restore(state) is None
    url = manager.save(100, state_of(7.0), {"step": 100})
    assert url == f"{folder.url}/step_00000100"
    assert manager.restore(state) == {"step": 100}
    assert_holds(state, 7.0)
    stored = set(folder.child("step_00000100").names())
    assert stored == {COMPLETE, INDEX, PART}


def test_the_newest_complete_one_is_taken(folder):
    manager = manager_of(folder)
    for step in (1, 20, 3):
        manager.save(step, state_of(step), {"step": step})
    state = state_of(0.0)
    assert manager.restore(state) == {"step": 20}
    assert manager.newest().meta == {"step": 20}
    assert_holds(state, 20.0)


def cut(folder, name):
    data = folder.read_bytes(name)
    folder.write_bytes(name, data[: len(data) // 2])


def flip_last_byte(folder, name):
    data = bytearray(folder.read_bytes(name))
    data[-1] ^= 1
    folder.write_bytes(name, bytes(data))


def remove(folder, name):
    folder.remove(name)


DAMAGES = [
    (cut, PART, "has .* bytes, its index"),
    (flip_last_byte, PART, "is damaged in bytes 0 to"),
    (remove, PART, f"{PART} is missing"),
    (cut, INDEX, f"{INDEX} is not the one that {COMPLETE} names"),
    (flip_last_byte, COMPLETE, f"{INDEX} is not the one that {COMPLETE} names"),
    (remove, COMPLETE, f"{COMPLETE} is missing"),
    (remove, INDEX, f"{INDEX} is missing"),
]


@pytest.mark.parametrize(("damage", "name", "message"), DAMAGES)
def test_a_damaged_one_is_named_and_the_previous_one_taken(
    folder, damage, name, message, warnings_of
):
    manager = manager_of(folder)
    for step in (1, 2):
        manager.save(step, state_of(step), {"step": step})
    damage(folder.child("step_00000002"), name)
    state = state_of(0.0)
    assert manager.restore(state) == {"step": 1}
    assert_holds(state, 1.0)
    (warning,) = warnings_of("dtr_scale.checkpoint.manager")
    assert "checkpoint passed over" in warning
    assert "step_00000002" in warning
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder.child("step_00000002")).read_into(state)


def test_none_complete_is_an_error_and_changes_nothing(folder):
    manager = manager_of(folder)
    manager.save(1, state_of(1.0), {"step": 1})
    cut(folder.child("step_00000001"), PART)
    state = state_of(5.0)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .*resume=never"):
        manager.restore(state)
    assert_holds(state, 5.0)


def test_a_save_cut_off_does_not_count(folder):
    """What a kill in the middle of the first save leaves is no checkpoint."""
    manager = manager_of(folder)
    if folder.is_local:
        folder.write_bytes(f".step_00000005.tmp/{PART}", b"half")
    else:
        folder.write_bytes(f"step_00000005/{UNFINISHED}", b"")
        folder.write_bytes(f"step_00000005/{PART}", b"half")
    assert manager.restore(state_of(0.0)) is None
    manager.save(5, state_of(5.0), {"step": 5})
    state = state_of(0.0)
    assert manager.restore(state) == {"step": 5}
    assert folder.names() == ["step_00000005"]


def test_a_damaged_one_of_the_same_step_is_replaced(folder):
    manager = manager_of(folder)
    manager.save(5, state_of(1.0), {"step": 5})
    cut(folder.child("step_00000005"), PART)
    manager.save(5, state_of(2.0), {"step": 5})
    state = state_of(0.0)
    assert manager.restore(state) == {"step": 5}
    assert_holds(state, 2.0)


def test_the_last_ones_and_every_nth_are_kept(folder):
    manager = manager_of(folder, keep_last=2, keep_every=30)
    for step in range(10, 80, 10):
        manager.save(step, state_of(step), {"step": step})
    assert folder.names() == [f"step_{step:08d}" for step in (30, 60, 70)]


def test_damaged_ones_do_not_count_among_the_last(folder):
    """Passed over and newer than what is saved now, they must not cost a good one its place."""
    manager = manager_of(folder, keep_last=1)
    for step in (20, 40):
        manager_of(folder, keep_last=9).save(step, state_of(step), {"step": step})
    cut(folder.child("step_00000040"), PART)
    manager.save(30, state_of(30), {"step": 30})
    assert folder.names() == ["step_00000030", "step_00000040"]
    assert manager.restore(state_of(0.0)) == {"step": 30}


@pytest.mark.parametrize("most_bytes", [100, 500])  # of a file: no part, or a part but no index
def test_a_failed_save_leaves_nothing_under_the_final_name(tmp_path, most_bytes):
    """The system takes no more bytes: one clear error, the old checkpoint stays and counts."""
    folder = Folder(tmp_path)
    manager = manager_of(folder)
    manager.save(1, state_of(1.0), {"step": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot save .*File too large.*; make room"):
            manager.save(2, state_of(2.0), {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step_00000002" not in folder.names()
    assert manager.restore(state_of(0.0)) == {"step": 1}
    manager.save(3, state_of(3.0), {"step": 3})
    assert folder.names() == ["step_00000001", "step_00000003"]


def test_a_place_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"another checkpoint\.dir"):
        manager_of(Folder(tmp_path / "file" / "checkpoints")).probe()
    manager_of(Folder(tmp_path / "new")).probe()
    assert Folder(tmp_path / "new").names() == []


def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path):
    """An outage must stop the start, not send the run back to an older checkpoint."""
    folder = Folder(tmp_path)
    manager = manager_of(folder)
    manager.save(1, state_of(1.0), {"step": 1})
    manager.save(2, state_of(2.0), {"step": 2})
    (tmp_path / "step_00000002" / INDEX).unlink()
    (tmp_path / "step_00000002" / INDEX).mkdir()  # reading it is an error, but not "missing"
    with pytest.raises(CheckpointError, match=f"{INDEX} cannot be read"):
        manager.restore(state_of(0.0))


def test_a_network_of_another_shape_is_refused(folder):
    manager = manager_of(folder)
    manager.save(1, state_of(1.0), {"step": 1})
    reader = manager.newest()
    with pytest.raises(ConfigError, match=r"master/a has shape \(3, 4\), this run needs \(5,\)"):
        reader.read_into({"master/a": Piece((5,), 0, torch.zeros(5))})
    with pytest.raises(ConfigError, match="master/b has shape None"):
        reader.read_into({"master/b": Piece((5,), 0, torch.zeros(5))})


@given(
    cuts=st.lists(st.integers(0, 100), max_size=5),
    start=st.integers(0, 99),
    length=st.integers(1, 100),
    block_bytes=st.sampled_from([16, 64, 4096]),
)
def test_any_range_is_read_from_any_cut_of_a_tensor(
    tmp_path_factory, cuts, start, length, block_bytes
):
    """Pieces stored by ranks that cut a tensor anywhere give every range of it back."""
    length = min(length, 100 - start)
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    edges = sorted({0, 100, *cuts})
    folder = Folder(tmp_path_factory.mktemp("cut"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "BLOCK_BYTES", block_bytes)
        entries = []
        for rank, (first, last) in enumerate(itertools.pairwise(edges)):
            path = folder.local_path / f"rank_{rank:05d}.safetensors"
            piece = Piece((10, 10), first, values[first:last])
            entries.append(write_rank_file(path, {"master/w": piece}))
        index = layout.build_index(entries, {"step": 1})
        folder.write_bytes(INDEX, index)
        folder.write_bytes(COMPLETE, layout.complete_mark(index))
        reader = CheckpointReader(folder)
        assert torch.equal(reader.read("master/w", start, length), values[start : start + length])
        assert torch.equal(reader.read_whole("master/w"), values.view(10, 10))


def test_the_files_are_plain_safetensors_and_json(tmp_path):
    """Anything that reads safetensors can read a checkpoint, without this package or pickle."""
    from safetensors.torch import load_file

    manager_of(Folder(tmp_path)).save(1, state_of(3.0), {"step": 1})
    tensors = load_file(tmp_path / "step_00000001" / PART)
    assert torch.equal(tensors["ema/a"], torch.full((12,), 3.0))
    index = json.loads((tmp_path / "step_00000001" / INDEX).read_text())
    assert index["tensors"]["master/a"]["shape"] == [3, 4]
