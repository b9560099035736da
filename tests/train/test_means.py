"""Means of the losses between two records, also over a checkpoint in between."""

import json

import pytest

from dtr_scale.train.means import LossMeans
from tests.support.runs import BATCH, journal, kept, status, train

EVERY = ("--train.log_every=3", "--checkpoint.every_steps=2")


def test_means_are_of_the_steps_since_the_last_record():
    means = LossMeans()
    means.add(1.0, 0.5)
    means.add(2.0, 0.25)
    expected = {"loss_mean": 1.875, "mse_mean": 1.5, "vb_mean": 0.375}
    assert means.record() == expected
    means.close()
    assert means.record() == expected  # a save of that step is ranked by them, too
    means.add(4.0, 0.0)
    assert means.record() == {"loss_mean": 4.0, "mse_mean": 4.0, "vb_mean": 0.0}


@pytest.mark.parametrize("closed", [False, True])
def test_means_go_on_from_a_checkpoints_meta(closed):
    whole, first, second = LossMeans(), LossMeans(), LossMeans()
    for means in (whole, first):
        means.add(0.1, 0.2)
        means.add(0.3, 0.7)
        if closed:
            means.close()
    second.load(json.loads(json.dumps(first.meta())))
    assert second.record() == whole.record()
    for means in (whole, second):
        means.add(1 / 3, 1 / 7)
    assert second.record() == whole.record()
    second.load({})  # of a checkpoint without means
    second.add(1.0, 2.0)
    assert second.record()["loss_mean"] == 3.0


def test_a_run_resumed_between_two_records_has_the_same_means(digits, tmp_path):
    steps = (*BATCH, *EVERY, "--train.max_steps=9")
    each = (*BATCH, "--train.max_steps=9", "--train.log_every=1")
    assert train(digits, tmp_path / "each", *each) == 0
    assert train(digits, tmp_path / "whole", *steps) == 0
    run_dir = tmp_path / "resumed"
    assert train(digits, run_dir, *steps, "--train.max_minutes=1e-9") == 75
    while status(run_dir)["outcome"] == "preempted":  # a step in each job
        assert train(digits, run_dir, *steps, "--train.max_minutes=1e-9") in (0, 75)
    records = journal(tmp_path / "whole")
    assert journal(run_dir) == records
    own = journal(tmp_path / "each")
    for record, last in zip(records, (3, 6, 9), strict=True):
        assert record["step"] == last
        for key in ("loss", "mse", "vb"):
            assert record[key] == own[last - 1][key]
            mean = sum(step[key] for step in own[last - 3 : last]) / 3
            assert record[f"{key}_mean"] == pytest.approx(mean, rel=1e-12)


def test_the_best_checkpoint_is_that_of_the_lowest_mean(digits, tmp_path):
    steps = (*BATCH, "--train.max_steps=12", "--train.lr=1e-6", "--train.seed=1")
    best = ("--checkpoint.keep_best=1", "--checkpoint.keep_last=1")
    assert train(digits, tmp_path, *steps, *EVERY, *best) == 0
    assert train(digits, tmp_path / "each", *steps) == 0
    losses = {record["step"]: record["loss"] for record in journal(tmp_path / "each")}
    # A save between two records, too, is ranked by what the next record begins with.
    windows = {2: (1, 2), 4: (4,), 6: (4, 5, 6), 8: (7, 8), 10: (10,), 12: (10, 11, 12)}
    means = {step: sum(losses[k] for k in steps) / len(steps) for step, steps in windows.items()}
    lowest = min(means, key=lambda step: means[step])
    assert lowest != min(windows, key=lambda step: losses[step]), "a step's own loss would do"
    assert kept(tmp_path) == sorted({12, lowest})
