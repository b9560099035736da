"""The best checkpoints stay, whatever became of the file that tells which they are."""

import json
import math

import pytest
import torch

from dtr_scale.checkpoint.best import BEST
from dtr_scale.checkpoint.catalog import Catalog
from dtr_scale.checkpoint.manager import CheckpointManager
from dtr_scale.checkpoint.retention import METRICS, Keep, Retention
from dtr_scale.engines.base import Piece
from dtr_scale.engines.world import World
from dtr_scale.storage.folder import open_folder

NAME = "dtr_scale.checkpoint.retention"


def save(folder, step, figures, manager=None):
    """Save as a new job does, which keeps the newest and the best."""
    world = World(0, 0, 1, torch.device("cpu"))
    manager = manager or CheckpointManager(folder, world=world, keep=Keep(last=1, best=1))
    manager.save(step, {"master/a": Piece((2,), 0, torch.zeros(2))}, {"step": step}, figures)
    manager.wait()
    return manager


def steps_in(folder):
    return sorted(Catalog(folder).steps())


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "3", "null", '"10"', '{"ten": {"loss": 1.0}}', '{"10": 1.0}', '{"10": []}',
        '{"10": null}', '{"10": {"loss": "low"}}', '{"10": {"loss": null}}', '{"10": {"loss": []}}',
        '{"format": 2, "steps": {}}',
    ],
)  # fmt: skip
def test_a_metrics_file_of_another_shape_ends_no_run_and_costs_no_checkpoint(
    tmp_path, content, warnings_of
):
    """Not even a note may raise: an evaluation calls it in the middle of training."""
    folder = open_folder(tmp_path)
    save(folder, 10, {"loss": 0.1})
    (tmp_path / METRICS).write_text(content)
    manager = save(folder, 20, {"loss": 1.0})
    save(folder, 30, {"loss": 1.0}, manager)
    manager.note(30, {"pixel_frechet_distance": 1.0})
    assert steps_in(folder) == [10, 20, 30]
    assert (tmp_path / METRICS).read_text() == content, "the user may want to mend it"
    told = warnings_of(NAME)
    assert all(METRICS in line and "remove it" in line and "\n" not in line for line in told)
    assert any(line.startswith("old checkpoints stay") for line in told)

    (tmp_path / METRICS).unlink()
    save(folder, 40, {"loss": 0.5}, manager)
    assert steps_in(folder) == [40]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_is_never_the_best(tmp_path, loss):
    folder = open_folder(tmp_path)
    for step, value in ((10, loss), (20, 3.0), (30, 4.0), (40, 5.0)):
        save(folder, step, {"loss": value})
    assert steps_in(folder) == [20, 40]


def test_steps_without_a_figure_or_a_checkpoint_are_passed_over(tmp_path):
    folder = open_folder(tmp_path)
    (tmp_path / METRICS).write_text(json.dumps({"5": {"loss": 0.0}, "20": {"mse": 0.0}}))
    for step, figures in ((10, {"loss": 2.0}), (20, None), (30, {"loss": 3.0}), (40, None)):
        save(folder, step, figures)
    assert steps_in(folder) == [10, 40]
    assert json.loads((tmp_path / METRICS).read_text()) == {"10": {"loss": 2.0}, "40": {}}


def test_a_metrics_file_that_cannot_be_read_is_told(tmp_path, warnings_of):
    folder = open_folder(tmp_path)
    save(folder, 10, {"loss": 1.0})
    (tmp_path / METRICS).unlink()
    (tmp_path / METRICS).mkdir()
    retention = Retention(Catalog(folder), Keep(last=1, best=1))
    retention.note(10, {"loss": 1.0})
    retention.retire(10)
    assert len(warnings_of(NAME)) == 2
    assert steps_in(folder) == [10]


def last_one(folder):
    """Return the manager of a new job that keeps the newest checkpoint alone."""
    return CheckpointManager(folder, world=World(0, 0, 1, torch.device("cpu")), keep=Keep(last=1))


def test_the_tagged_checkpoint_stays_until_another_is_better(tmp_path):
    folder = open_folder(tmp_path)
    for step, value in ((10, 5.0), (20, 3.0), (30, 4.0), (40, math.nan)):
        manager = save(folder, step, {"loss": 1.0}, last_one(folder))
        manager.rank(step, value, "fid", "settings")
    assert steps_in(folder) == [20, 40]
    assert json.loads((tmp_path / BEST).read_text()) == {
        "step": 20, "metric": "fid", "settings": "settings", "values": {"20": 3.0}
    }  # fmt: skip

    manager = last_one(folder)
    manager.rank(50, 2.0, "fid", "settings")  # while its save is still under way
    save(folder, 50, {}, manager)
    assert steps_in(folder) == [50]


def test_a_tag_goes_to_a_checkpoint_that_is_there(tmp_path):
    """The save of the better one failed after it had been evaluated."""
    folder = open_folder(tmp_path)
    save(folder, 10, {}, last_one(folder)).rank(10, 5.0, "fid", "")
    last_one(folder).rank(20, 1.0, "fid", "")
    save(folder, 30, {}, last_one(folder))
    assert steps_in(folder) == [10, 30]
    assert json.loads((tmp_path / BEST).read_text())["step"] == 10


def test_numbers_of_other_settings_do_not_count(tmp_path):
    folder = open_folder(tmp_path)
    save(folder, 10, {}, last_one(folder)).rank(10, 5.0, "fid", "10,000 samples")
    save(folder, 20, {}, last_one(folder)).rank(20, 9.0, "fid", "5,000 samples")
    save(folder, 30, {}, last_one(folder))
    assert steps_in(folder) == [20, 30]


@pytest.mark.parametrize("content", ["", "[]", '{"values": {"x": 1}}', '{"values": 3}'])
def test_a_damaged_tag_is_made_anew(tmp_path, content):
    folder = open_folder(tmp_path)
    save(folder, 10, {}, last_one(folder))
    (tmp_path / BEST).write_text(content)
    save(folder, 20, {}, last_one(folder)).rank(20, 5.0, "fid", "")
    assert json.loads((tmp_path / BEST).read_text())["step"] == 20
    assert steps_in(folder) == [20]
