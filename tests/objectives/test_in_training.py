"""Objectives and clusters in runs of the demo: what is differentiated, however it is split."""

import pytest
import torch

from dtr_scale.engines.world import World
from dtr_scale.jobs.build import build_trainer
from tests.support.runs import SINGLE, TIMINGS, demo_experiment, run_trainer

LONE = World(0, 0, 1, torch.device("cpu"))
EVEN = ("--objective.num_clusters=7",)
MOSTLY_EMPTY = ("--objective.num_clusters=40",)
LOG_SNR = ("--objective.num_clusters=8", "--objective.clusters=log_snr")
GRADIENT = (
    "--objective.num_clusters=3",
    "--objective.clusters=gradient",
    "--objective.boundaries=[0, 30, 800, 1000]",
)


def trainer(digits, run_dir, *overrides, micro=24):
    size = ("--train.global_batch_size=24", f"--train.micro_batch_size={micro}")
    experiment = demo_experiment(digits, run_dir, *SINGLE, *size, "--train.max_steps=3", *overrides)
    return build_trainer(experiment, LONE)


@pytest.mark.parametrize(
    ("type", "clusters"),
    [("vanilla", EVEN), ("min_snr", EVEN), ("p2", MOSTLY_EMPTY)]
    + [("ant_uw", clusters) for clusters in (EVEN, MOSTLY_EMPTY, LOG_SNR, GRADIENT)],
)
def test_a_run_does_not_depend_on_the_split(digits, tmp_path, type, clusters):
    overrides = (f"--objective.type={type}", *clusters)
    whole = trainer(digits, tmp_path, *overrides)
    records = run_trainer(whole)
    split = run_trainer(trainer(digits, tmp_path, *overrides, micro=6))
    for one, other in zip(records, split, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - TIMINGS:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
        assert one["loss"] == one["mse"] + one["vb"]
    first = records[0]
    if type == "vanilla":
        assert first["objective"] == pytest.approx(first["loss"], rel=1e-6)
    elif type == "ant_uw":  # whose log-variances start at 0
        means = [value for key, value in first.items() if key.startswith("loss_cluster_")]
        assert len(means) == min(whole.timesteps.num_clusters, 24)
        expected = sum(means) / whole.timesteps.num_clusters / 2
        assert first["objective"] == pytest.approx(expected, rel=1e-6)
    else:
        assert first["vb"] < first["objective"] < first["loss"]


@pytest.mark.parametrize(
    ("type", "clusters", "expected"),
    [
        ("ant_uw", EVEN, [0, 142, 285, 428, 571, 714, 857, 1000]),
        ("ant_uw", LOG_SNR, [0, 63, 178, 335, 518, 697, 846, 949, 1000]),
        ("ant_uw", GRADIENT, [0, 30, 800, 1000]),
        ("p2", GRADIENT, [0, 1000 / 3, 2000 / 3, 1000]),
    ],
)
def test_timesteps_are_drawn_in_the_clusters_of_the_objective(
    digits, tmp_path, type, clusters, expected
):
    timesteps = trainer(digits, tmp_path, f"--objective.type={type}", *clusters).timesteps
    assert timesteps.boundaries.tolist() == expected
