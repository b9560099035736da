"""Ranks that fail or leave together; the draws and batches of an evaluation."""

import threading

import numpy as np
import pytest
import torch

from dtr_scale.diffusion.timesteps import TimestepSampler
from dtr_scale.engines.world import World
from dtr_scale.train.held_out import FixedTimesteps
from dtr_scale.train.kept_batches import KeptBatches, remove_others
from dtr_scale.train.rounds import CutOffError, FailedError, Rounds

ALONE = World(0, 0, 1, torch.device("cpu"))


def test_work_of_rank_0_is_waited_for_unless_it_is_to_leave():
    asked = []
    rounds = Rounds(ALONE, lambda: asked[0] if asked else None)
    assert rounds.on_main(lambda: 7) == 7
    with pytest.raises(FailedError, match="ZeroDivisionError: "):
        rounds.on_main(lambda: 1 // 0)
    hangs = threading.Event()

    def work():
        asked.append("SIGTERM")
        hangs.wait()

    with pytest.raises(CutOffError):
        rounds.on_main(work)
    assert rounds.leave_reason() == "SIGTERM"
    hangs.set()


def test_a_round_is_finished_before_ranks_leave():
    asked, done = [], []
    rounds = Rounds(ALONE, lambda: asked[0] if asked else None)
    with rounds.joint():
        asked.append("SIGTERM")
        done.append(1)
    with pytest.raises(CutOffError), rounds.joint():
        done.append(2)
    assert done == [1]


def test_each_cluster_has_eight_timesteps_of_its_own():
    boundaries = np.array([0, 100, 110, 1000])
    timesteps = FixedTimesteps(TimestepSampler(0, boundaries, global_batch_size=12))
    assert timesteps.num_places == 24
    t, cluster = timesteps.draw(0, range(24))
    for k in range(3):
        mine = t[cluster == k]
        assert len(set(mine)) == 8
        assert boundaries[k] <= mine.min() and mine.max() < boundaries[k + 1]
    again, _ = timesteps.draw(24, np.array([0, 5]))
    assert again.tolist() == t[[0, 5]].tolist()


def test_batches_of_another_plan_or_damaged_ones_are_drawn_again(tmp_path, warnings_of):
    kept = KeptBatches(tmp_path, 3, {"seed": 0})
    for number in (2, 10, 1):
        kept.add(number, {"x": np.full(2, number)})
    assert kept.joined()["x"].tolist() == [1, 1, 2, 2, 10, 10]
    found = KeptBatches(tmp_path, 3, {"seed": 0})
    found.load()
    assert found.exist and sorted(found.batches) == [1, 2, 10] and not found.num_added
    (tmp_path / ".step_00000003/10.npz").write_bytes(b"PK")
    found = KeptBatches(tmp_path, 3, {"seed": 0})
    found.load()
    assert not found.batches and not found.exist
    (warning,) = warnings_of("dtr_scale.train.kept_batches")
    assert "its batches are drawn again" in warning

    kept = KeptBatches(tmp_path, 3, {"seed": 0})
    kept.add(0, {"x": np.zeros(1)})
    other = KeptBatches(tmp_path, 3, {"seed": 1})
    other.load()
    assert not other.batches and not other.exist

    kept.add(1, {"x": np.zeros(1)})
    remove_others(tmp_path, 3)
    assert kept.exist
    remove_others(tmp_path, 4)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_batch_costs_no_evaluation(tmp_path, warnings_of):
    (tmp_path / "samples").write_text("a file in the place of the folder")
    kept = KeptBatches(tmp_path / "samples", 3, {})
    kept.add(0, {"x": np.zeros(1)})
    kept.add(1, {"x": np.ones(1)})
    assert kept.joined()["x"].tolist() == [0, 1]
    (warning,) = warnings_of("dtr_scale.train.kept_batches")
    assert "not kept for the next start" in warning
