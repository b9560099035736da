"""Curves keep what matters of long and noisy journals, and their axes are honest."""

import numpy as np
import pytest

from dtr_scale.evaluation.comparison.curves import (
    MOST_POINTS,
    last_common_step,
    mean_before,
    running_mean,
    thinned,
)
from dtr_scale.evaluation.comparison.record import RunRecord, as_columns


def record(records, **facts):
    return RunRecord("run", "runs/run", {}, as_columns(records), facts=facts)


def test_a_long_journal_is_drawn_by_few_points_from_its_first_to_its_last():
    x = np.arange(1, 20_001) * 100.0
    y = np.exp(-x / 5e5) + 0.1 * np.random.default_rng(0).standard_normal(len(x))
    curve = thinned(0, x, y)
    assert len(curve.x) == MOST_POINTS and (curve.x[0], curve.x[-1]) == (x[0], x[-1])
    assert np.abs(curve.y - np.exp(-curve.x / 5e5))[1:-1].max() < 0.03
    assert curve.deviation is not None and np.allclose(curve.deviation, 0.1, atol=0.03)


@pytest.mark.parametrize("count", [1, 2, 3, 39, 41])
def test_a_short_journal_keeps_every_point(count):
    y = np.arange(count, dtype=float)
    curve = thinned(0, y, y)
    assert (curve.x == y).all() and np.abs(curve.y - y).max() <= 0.5


def test_a_running_mean_is_that_of_the_values_around():
    y = np.random.default_rng(0).standard_normal(50)
    expected = [y[max(i - 3, 0) : i + 4].mean() for i in range(50)]
    assert np.allclose(running_mean(y, 7), expected)
    assert np.allclose(running_mean(y, 1), y)


def test_the_loss_of_a_record_is_the_mean_of_its_steps_where_that_is_told():
    records = [
        {"step": 1, "loss": 1.0},  # written before there were means
        {"step": 2, "eval_loss": 0.5},
        {"step": 3, "loss": 19.6, "loss_mean": 2.0},
    ]
    run = record(records)
    np.testing.assert_equal(run.column("loss_mean"), [1.0, np.nan, 2.0])
    assert mean_before(run, "loss_mean", 3) == 2.0
    np.testing.assert_equal(record(records[:2]).column("loss_mean"), [1.0, np.nan])
    assert record([{"step": 1}]).column("loss_mean") is None


def test_gpu_hours_are_time_by_throughput_times_ranks():
    records = [
        {"step": 1, "samples_seen": 3600, "samples_per_second": 1.0},
        {"step": 2, "samples_seen": 7200, "samples_per_second": 2.0},
        {"step": 2, "samples_seen": 7200, "eval_loss": 0.5},  # takes no time of its own
    ]
    hours = record(records, world_size=8).column("gpu_hours")
    assert hours is not None and hours.tolist() == [8.0, 12.0, 12.0]
    assert record(records).column("gpu_hours") is None  # of how many ranks is not known


def test_a_record_that_lacks_a_figure_costs_no_other():
    run = record(
        [{"step": 1, "loss": 1.0}, {"step": 2, "eval_loss": 3.0}, {"step": 3, "loss": 2.0}]
    )
    assert np.isnan(run.journal["loss"]).tolist() == [False, True, False]
    assert mean_before(run, "loss", 2) == 1.0 and mean_before(run, "loss", 3) == 2.0
    assert np.isnan(mean_before(run, "fid", 3))


def test_the_last_common_step_is_that_of_the_shortest_run():
    assert last_common_step([record([{"step": 5}]), record([{"step": 3}, {"step": 4}])]) == 4
