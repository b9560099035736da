"""Numbers stand side by side under equal manifests, or with what these differ in."""

import numpy as np
import pytest

from dtr_scale.evaluation.comparison.record import UNKNOWN, Evaluation, RunRecord
from dtr_scale.evaluation.comparison.results import (
    curve_metrics,
    manifest_differences,
    metric_curves,
    result_blocks,
)
from dtr_scale.evaluation.comparison.tables import comparison_tables, table_text

MANIFEST = {"sampler": "ddpm", "cfg_scale": 1.5, "reference": {"inception": {"sha256": "ab"}}}


def measured(step, fid, time="", **manifest):
    told = MANIFEST | {"step": step, "checkpoints": [f"step_{step}"]} | manifest
    return Evaluation(step, time, {"fid": fid}, told)


def run(*evaluations, name="run", **settings):
    journal = {"step": np.array([10.0, 20.0]), "loss": np.array([1.0, 0.5])}
    return RunRecord(name, f"runs/{name}", settings, journal, evaluations=evaluations)


def chosen(block):
    return [each and (each.step, each.metrics["fid"]) for each in block.chosen]


def texts(*runs):
    return [table_text(table) for table in comparison_tables(runs)]


def test_equal_manifests_make_one_table_with_the_change():
    (block,) = result_blocks([run(measured(20, 4.0)), run(measured(20, 3.0))])
    assert block.is_comparable and chosen(block) == [(20, 4.0), (20, 3.0)]
    _, results, *_ = texts(run(measured(20, 4.0)), run(measured(20, 3.0)))
    assert "Results under equal manifests" in results and "3 (-25.0%)" in results
    assert "Not comparable" not in results


def test_different_manifests_stand_beside_the_numbers_and_no_change_is_told():
    other = measured(20, 3.0, cfg_scale=3.0, reference={"inception": {"sha256": "cd"}})
    (block,) = result_blocks([run(measured(20, 4.0)), run(other)])
    assert block.differences == {
        "cfg_scale": ["1.5", "3.0"],
        "reference.inception.sha256": ["ab", "cd"],
    }
    _, results, *_ = texts(run(measured(20, 4.0)), run(other))
    caution = "Not comparable as they stand: their manifests differ in cfg_scale,"
    assert caution in results and "%" not in results


def test_at_different_steps_the_last_common_step_comes_first():
    slow, fast = run(measured(10, 8.0)), run(measured(10, 7.0), measured(20, 4.0))
    same, newest = result_blocks([slow, fast])
    assert chosen(same) == [(10, 8.0), (10, 7.0)]
    assert chosen(newest) == [(10, 8.0), (20, 4.0)]
    _, first, second, *_ = texts(slow, fast)
    assert "7 (-12.5%)" in first
    assert "%" not in second and "different steps" in second


def test_of_two_numbers_of_a_step_the_newer_counts():
    again = run(measured(20, 5.0, "09:00"), measured(20, 4.0, "10:00"))
    assert chosen(result_blocks([again, run(measured(20, 3.0))])[0])[0] == (20, 4.0)


def test_a_run_without_evaluations_leaves_a_gap():
    (block,) = result_blocks([run(measured(20, 4.0)), run(), run(measured(20, 3.0))])
    assert chosen(block) == [(20, 4.0), None, (20, 3.0)]
    assert result_blocks([run(), run()]) == []


def test_a_number_without_a_manifest_is_comparable_with_none():
    unknown, other = (Evaluation(20, "", {"fid": 3.0}, {UNKNOWN: name}) for name in "ab")
    assert manifest_differences([measured(20, 4.0), unknown]) == {"manifest": ["known", "unknown"]}
    (block,) = result_blocks([run(unknown), run(other)])
    assert not block.is_comparable


def test_curves_are_of_the_manifest_that_most_runs_share():
    final = measured(20, 2.0, cfg_scale=4.0)
    a = run(measured(10, 8.0), measured(20, 4.0), final)
    b = run(measured(10, 7.0), measured(20, 3.0))
    assert [[e.metrics["fid"] for e in points] for points in metric_curves([a, b], "fid")] == [
        [8.0, 4.0],
        [7.0, 3.0],
    ]
    assert curve_metrics([a, b]) == ["fid"]
    assert curve_metrics([run(measured(20, 4.0)), run(final)]) == []


def test_settings_that_decide_what_is_trained_come_first():
    a = run(**{"engine.type": "fsdp2", "train.lr": 1e-4, "description": "one"})
    b = run(**{"engine.type": "single", "train.lr": 2e-4, "description": "another"})
    settings = texts(a, b)[-1].splitlines()
    assert [line.split() for line in settings[2:4]] == [
        ["train.lr", "0.0001", "0.0002"],
        ["engine.type", "fsdp2", "single"],
    ]
    assert "All settings are the same." in texts(a, a)[-1]


@pytest.mark.parametrize("key", ["diffusion.noise_schedule", "model.learn_sigma"])
def test_losses_of_different_problems_are_not_compared(key):
    losses = texts(run(**{key: "x"}), run(**{key: "y"}))[1]
    assert f"Not comparable as they stand: the runs differ in {key}." in losses
    assert "%)" not in losses.partition("\n")[2].partition("Not")[0]
