"""Two ranks save in the background: what hits one of them is agreed on by both."""

from pathlib import Path
from typing import Any

import torch

from dtr_scale.checkpoint.manager import CheckpointManager
from dtr_scale.checkpoint.snapshot import Snapshot
from dtr_scale.engines.base import Piece
from dtr_scale.engines.world import join_world
from dtr_scale.errors import EngineError, UnsavedError
from dtr_scale.storage.folder import open_folder
from tests.support.ranks import run_on_ranks

ENTRY = Snapshot.entry


def faulty_saves(place: Path) -> list[Any]:
    """Save while rank 1 has trouble now and then; return what the loop is told in the end."""
    world = join_world(needs_process_group=True)
    manager = CheckpointManager(open_folder(place), world=world, max_failures=2)
    half = torch.zeros(6)
    state = {
        "master/cut": Piece((12,), 6 * world.rank, half),
        "ema/whole": Piece((4,), 0, torch.zeros(4)),
    }
    told: list[Any] = []
    for step, trouble in enumerate([None, OSError, None, KeyError, OSError, OSError, None], 1):

        def entry(self: Snapshot, file: str, trouble: Any = trouble) -> dict[str, Any]:
            if trouble and world.rank == 1:
                raise trouble("no more")
            return ENTRY(self, file)

        Snapshot.entry = entry
        half.fill_(step)
        try:
            manager.save(step, state, {"step": step})
            manager.wait()
            told.append(manager.saved_step)
        except (UnsavedError, EngineError) as error:
            told.append((type(error).__name__, manager.saved_step))
            manager = CheckpointManager(open_folder(place), world=world, max_failures=2)
    plan = manager.load_newest(state)
    told.append((plan and plan.reader.meta, half.tolist(), open_folder(place).names()))
    world.leave()
    return told


def test_all_ranks_learn_what_hit_one_of_them(tmp_path):
    first, second = run_on_ranks(2, faulty_saves, tmp_path)
    assert first == second
    assert first[:3] == [1, 1, 3], "the second failed, training went on"
    assert first[3] == ("EngineError", 3), "what nobody foresaw ends the run"
    assert first[4:6] == [None, ("UnsavedError", None)], "as do two failures in a row"
    kept = [f"step_{step:08d}" for step in (1, 3, 7)]
    assert first[6:] == [7, ({"step": 7}, [7.0] * 6, kept)]
