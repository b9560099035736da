"""Checkpoints appear whole or not at all, and a damaged one is never loaded."""

import contextlib
import itertools
import json
import re
import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dtr_scale.checkpoint.layout import COMPLETE, INDEX
from dtr_scale.checkpoint.manager import CheckpointManager
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.checkpoint.retention import METRICS, Keep
from dtr_scale.checkpoint.snapshot import Snapshot
from dtr_scale.engines.base import Piece
from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError, ConfigError, UnsavedError
from dtr_scale.storage.folder import open_folder

LONE = World(0, 0, 1, torch.device("cpu"))
PART = "rank_00000.safetensors"


def state_of(value: float) -> dict[str, Piece]:
    value = float(value)
    return {
        "master/a": Piece((3, 4), 0, torch.arange(12.0) + value),
        "ema/a": Piece((3, 4), 0, torch.full((12,), value)),
        "objective/step": Piece((), 0, torch.tensor([value])),
    }


def manager_of(folder, max_failures=3, **keep):
    return CheckpointManager(folder, world=LONE, keep=Keep(**keep), max_failures=max_failures)


def save(manager, step, value=None, figures=None):
    """Save the state of `value`, by default of the step, and wait for it."""
    manager.save(step, state_of(step if value is None else value), {"step": step}, figures)
    manager.wait()


def loaded(manager, state):
    """Load the newest checkpoint into the state and return its meta."""
    plan = manager.load_newest(state)
    assert plan is not None
    return plan.reader.meta


def assert_holds(state, value):
    expected = state_of(value)
    assert all(torch.equal(piece.data, expected[key].data) for key, piece in state.items())


def test_what_is_saved_is_restored(folder):
    manager = manager_of(folder)
    state = state_of(0.0)
    assert manager.load_newest(state) is None
    save(manager, 100, 7.0)
    assert manager.url(100) == f"{folder.url}/step_00000100"
    assert loaded(manager, state) == {"step": 100}
    assert_holds(state, 7.0)
    stored = set(folder.child("step_00000100").names())
    assert stored == {COMPLETE, INDEX, PART}


def test_the_newest_complete_one_is_taken(folder):
    manager = manager_of(folder)
    for step in (1, 20, 3):
        save(manager, step)
    state = state_of(0.0)
    assert loaded(manager, state) == {"step": 20}
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
        save(manager, step)
    damage(folder.child("step_00000002"), name)
    state = state_of(0.0)
    assert loaded(manager, state) == {"step": 1}
    assert_holds(state, 1.0)
    (warning,) = warnings_of("dtr_scale.checkpoint.manager")
    assert "checkpoint passed over" in warning
    assert "step_00000002" in warning
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder.child("step_00000002")).read_into(state)


def test_none_complete_is_an_error_and_no_fresh_start(folder):
    manager = manager_of(folder)
    save(manager, 1)
    cut(folder.child("step_00000001"), PART)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .*resume=never"):
        manager.load_newest(state_of(5.0))


def test_a_save_cut_off_does_not_count(folder):
    """What a kill in the middle of the first save leaves is no checkpoint."""
    manager = manager_of(folder)
    folder.stage("step_00000005")
    folder.staged("step_00000005").write_bytes(PART, b"half")
    assert manager.load_newest(state_of(0.0)) is None
    save(manager, 5)
    state = state_of(0.0)
    assert loaded(manager, state) == {"step": 5}
    assert folder.names() == ["step_00000005"]


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("again", [False, True], ids=["new_step", "damaged_step_again"])
def test_a_kill_between_any_two_changes_of_the_store_leaves_a_complete_one(
    folder, monkeypatch, again
):
    """Killed before its first, second, ... change; then restored, and saved to again."""
    moment, killed = 0, True
    while killed:
        place, changes = folder.child(str(moment)), itertools.count()
        save(manager_of(place, last=1), 1)
        if again:
            save(manager_of(place, last=9), 2)
            cut(place.child("step_00000002"), PART)
        manager = manager_of(place, last=1)
        with monkeypatch.context() as patch:
            for name in ("write_bytes", "remove", "rename"):
                if hasattr(folder, name):
                    patch.setattr(type(folder), name, mortal(type(folder), name, moment, changes))
            with contextlib.suppress(Killed):
                save(manager, 2)
        state = state_of(0.0)
        meta = loaded(manager_of(place), state)
        assert meta in ({"step": 1}, {"step": 2})
        assert_holds(state, meta["step"])
        assert manager.saved_step in (None, meta["step"])
        save(manager_of(place, last=1), 3)
        assert place.names() == ["step_00000003"]
        killed = next(changes) > moment
        moment += killed
    assert moment > 4


def mortal(kind, name, moment, changes):
    method = getattr(kind, name)

    def changing(self, *arguments):
        if next(changes) == moment:
            raise Killed
        return method(self, *arguments)

    return changing


def test_a_damaged_one_of_the_same_step_is_replaced(folder):
    manager = manager_of(folder)
    save(manager, 5, 1.0)
    cut(folder.child("step_00000005"), PART)
    save(manager, 5, 2.0)
    state = state_of(0.0)
    assert loaded(manager, state) == {"step": 5}
    assert_holds(state, 2.0)


def test_the_last_ones_and_every_nth_are_kept(folder):
    manager = manager_of(folder, last=2, every=30)
    for step in range(10, 80, 10):
        save(manager, step)
    assert folder.names() == [f"step_{step:08d}" for step in (30, 60, 70)]


def test_the_best_are_kept_across_restarts(folder):
    """By a figure of the step itself, or one that is known only after the save."""
    losses = {10: 3.0, 20: 0.5, 30: 2.0, 40: 1.0, 50: 4.0, 60: float("nan")}
    for step, loss in losses.items():  # each time by another job
        save(manager_of(folder, last=1, best=2), step, figures={"loss": loss})
    assert folder.names() == [METRICS, *(f"step_{step:08d}" for step in (20, 40, 60))]
    assert json.loads(folder.read_bytes(METRICS))["40"] == {"loss": 1.0}
    measured = manager_of(folder, last=1, best=1, metric="pixel_frechet_distance")
    measured.note(40, {"pixel_frechet_distance": 7.0})
    measured.note(60, {"pixel_frechet_distance": 8.0})
    save(measured, 70, figures={"loss": 0.1})
    assert folder.names() == [METRICS, "step_00000040", "step_00000070"]
    assert set(json.loads(folder.read_bytes(METRICS))) == {"40", "70"}


def test_a_figure_that_nobody_notes_is_told(tmp_path, warnings_of):
    manager = manager_of(open_folder(tmp_path), last=1, best=1, metric="los")
    for step in (1, 2):
        save(manager, step, figures={"loss": 1.0, "mse": 1.0})
    (warning,) = warnings_of("dtr_scale.checkpoint.retention")
    assert "best_metric = 'los' was noted for no checkpoint" in warning
    assert warning.endswith("noted are loss, mse")


def test_without_best_there_is_no_metrics_file(folder):
    save(manager_of(folder), 1, figures={"loss": 1.0})
    assert folder.names() == ["step_00000001"]


@pytest.mark.parametrize(("damage", "name"), [(cut, PART), (remove, PART), (remove, COMPLETE)])
def test_a_damaged_best_or_newest_takes_nobodys_place(folder, damage, name):
    """Complete ones stay as many as were asked for, found out by mark and sizes."""
    keep = {"last": 2, "best": 1}
    for step, loss in ((10, 2.0), (20, 1.0), (30, 3.0), (40, 3.0)):
        save(manager_of(folder, **keep | {"last": 9}), step, figures={"loss": loss})
    for step in (20, 40):
        damage(folder.child(f"step_{step:08d}"), name)
    save(manager_of(folder, **keep), 50, figures={"loss": 3.0})
    kept = [name for name in folder.names() if name != METRICS]
    assert kept == [f"step_{step:08d}" for step in (10, 30, 40, 50)]


def test_damaged_ones_do_not_count_among_the_last(folder):
    """Passed over and newer than what is saved now, they must not cost a good one its place."""
    manager = manager_of(folder, last=1)
    for step in (20, 40):
        save(manager_of(folder, last=9), step)
    cut(folder.child("step_00000040"), PART)
    save(manager, 30)
    assert folder.names() == ["step_00000030", "step_00000040"]
    assert loaded(manager, state_of(0.0)) == {"step": 30}


@pytest.mark.parametrize("most_bytes", [100, 400])  # of a file: no part, or a part but no index
def test_a_failed_save_leaves_nothing_under_the_final_name(tmp_path, most_bytes, warnings_of):
    """The system takes no more bytes: one clear error, the old checkpoint stays and counts."""
    folder = open_folder(tmp_path)
    manager = manager_of(folder)
    save(manager, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, before[1]))
    try:
        save(manager, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (warning,) = warnings_of("dtr_scale.checkpoint.manager")
    assert re.search(r"step 2 is not saved, .*cannot save .*File too large.*; make room", warning)
    assert manager.saved_step == 1
    assert folder.names() == ["step_00000001"]
    assert loaded(manager, state_of(0.0)) == {"step": 1}
    save(manager, 3)
    assert manager.saved_step == 3
    assert folder.names() == ["step_00000001", "step_00000003"]


def test_failures_in_a_row_end_the_run(tmp_path):
    (tmp_path / "file").write_text("no folder")
    manager = manager_of(open_folder(tmp_path / "file" / "checkpoints"), max_failures=2)
    save(manager, 1)
    with pytest.raises(
        UnsavedError, match=r"2 saves in a row failed.*nothing was saved yet.*cannot save"
    ):
        save(manager, 2)


def test_failures_with_a_success_between_them_do_not(tmp_path):
    place = tmp_path / "checkpoints"
    manager = manager_of(open_folder(place), max_failures=2)
    for step in (2, 4, 6):
        place.write_text("no folder")
        save(manager, step - 1)
        place.unlink()
        save(manager, step)
        assert manager.saved_step == step
        shutil.rmtree(place)


def test_training_goes_on_while_a_save_is_in_flight(tmp_path, monkeypatch):
    """What is stored is the state when `save` was called; until it is, no step counts as saved."""
    go_on = threading.Event()
    entry = Snapshot.entry
    monkeypatch.setattr(Snapshot, "entry", lambda self, file: go_on.wait() and entry(self, file))
    manager = manager_of(open_folder(tmp_path))
    state = state_of(1.0)
    manager.save(1, state, {"step": 1})
    state["master/a"].data.add_(100.0)  # the next training step
    assert manager.saved_step is None
    go_on.set()
    manager.save(2, state, {"step": 2})
    assert manager.saved_step == 1
    manager.wait()
    assert manager.saved_step == 2
    restored = state_of(0.0)
    manager_of(open_folder(tmp_path)).load_newest(restored)
    assert torch.equal(restored["master/a"].data, torch.arange(12.0) + 101.0)
    shutil.rmtree(tmp_path / "step_00000002")
    manager_of(open_folder(tmp_path)).load_newest(restored)
    assert_holds(restored, 1.0)


class Watched(dict):
    """A state that notes which threads read it."""

    def __init__(self, state):
        super().__init__(state)
        self.threads = set()

    def __getitem__(self, key):
        self.threads.add(threading.current_thread())
        return super().__getitem__(key)


def test_the_state_is_copied_before_the_loop_goes_on(tmp_path):
    """A copy taken in the thread that writes would mix this step's state with later ones."""
    manager = manager_of(open_folder(tmp_path))
    state = Watched(state_of(1.0))
    manager.save(1, state, {"step": 1})
    for piece in state.values():
        piece.data.fill_(9.0)
    manager.wait()
    assert state.threads == {threading.current_thread()}
    restored = state_of(0.0)
    manager.load_newest(restored)
    assert_holds(restored, 1.0)


def test_others_are_told_before_a_save_counts_and_when_it_does(folder):
    manager, told = manager_of(folder), []
    manager.before_commit = lambda: told.append(("before", manager.steps()))
    manager.on_saved = lambda step: told.append((step, manager.steps()))
    save(manager, 1)
    save(manager, 2)
    assert told == [("before", []), (1, [1]), ("before", [1]), (2, [2, 1])]


def test_trouble_of_those_who_are_told_is_not_the_save_s(tmp_path):
    manager = manager_of(open_folder(tmp_path))

    def fail(*_):
        raise OSError("no space left")

    manager.before_commit = manager.on_saved = fail
    save(manager, 1)
    assert manager.saved_step == 1


def test_what_nobody_foresaw_reaches_the_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(Snapshot, "entry", lambda self, file: {}["surprise"])
    manager = manager_of(open_folder(tmp_path))
    manager.save(1, state_of(1.0), {})
    with pytest.raises(KeyError, match="surprise"):
        manager.wait()
    manager.save(2, state_of(1.0), {})
    manager.close()


def test_a_place_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"another checkpoint\.dir"):
        manager_of(open_folder(tmp_path / "file" / "checkpoints")).check_folder()
    manager_of(open_folder(tmp_path / "new")).check_folder()
    assert open_folder(tmp_path / "new").names() == []


def test_starts_that_check_one_folder_at_once_do_not_disturb_each_other(tmp_path):
    folder = open_folder(tmp_path / "folder")

    def check(number):
        for _ in range(20):
            manager_of(folder).check_folder()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, range(4)))
    assert folder.names() == []


def test_a_folder_that_a_rank_does_not_see_is_refused_without_a_trace(tmp_path, monkeypatch):
    folder = open_folder(tmp_path)
    monkeypatch.setattr(folder, "exists", lambda name: False)  # as on a disk of another node
    with pytest.raises(CheckpointError, match=r"rank 0 does not see .*that all nodes share"):
        manager_of(folder).check_folder()
    assert folder.names() == []


def test_what_cannot_be_read_now_is_not_called_damaged(tmp_path):
    """An outage must stop the start, not send the run back to an older checkpoint."""
    folder = open_folder(tmp_path)
    manager = manager_of(folder)
    save(manager, 1)
    save(manager, 2)
    (tmp_path / "step_00000002" / INDEX).unlink()
    (tmp_path / "step_00000002" / INDEX).mkdir()  # reading it is an error, but not "missing"
    with pytest.raises(CheckpointError, match=f"{INDEX} cannot be read"):
        manager.load_newest(state_of(0.0))


def test_a_network_of_another_shape_is_refused(folder):
    manager = manager_of(folder)
    save(manager, 1)
    reader = CheckpointReader(folder.child("step_00000001"))
    with pytest.raises(ConfigError, match=r"master/a has shape \(3, 4\), this run needs \(5,\)"):
        reader.read_into({"master/a": Piece((5,), 0, torch.zeros(5))})
    with pytest.raises(ConfigError, match="master/b has shape None"):
        reader.read_into({"master/b": Piece((5,), 0, torch.zeros(5))})
