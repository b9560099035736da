"""Distances and scores give the known answers, and those of the published code."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.metrics import (
    Moments,
    RunningMoments,
    frechet_distance,
    inception_score,
    moments,
    moments_distance,
    precision_recall,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "metrics.npz")


def gaussian(mean, cov, n=200):
    """Return [n, d] features whose sample mean and covariance are exactly these."""
    x = np.random.default_rng(0).standard_normal((n, len(mean)))
    x -= x.mean(axis=0)
    whiten = np.linalg.cholesky(np.linalg.inv(np.atleast_2d(np.cov(x, rowvar=False))))
    return x @ whiten @ np.linalg.cholesky(cov).T + mean


def test_frechet_distance_equals_the_published_code():
    generated, reference = GOLDEN["generated_features"], GOLDEN["reference_features"]
    fid = float(GOLDEN["fid"])
    assert frechet_distance(generated, reference) == pytest.approx(fid, rel=1e-6)
    assert frechet_distance(reference, generated) == pytest.approx(fid, rel=1e-6)
    single = frechet_distance(generated.astype(np.float32), reference.astype(np.float32))
    assert single == pytest.approx(fid, rel=1e-5)


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        (([0.0], [[4.0]]), ([3.0], [[1.0]]), 9 + (2 - 1) ** 2),
        (([0, 0, 0], np.eye(3)), ([1, 2, 2], np.eye(3)), 9),
        (([0, 0], np.diag([1.0, 9])), ([0, 0], np.diag([4.0, 16])), (1 - 2) ** 2 + (3 - 4) ** 2),
        # S_2 = Q S_1 Q^T, a quarter turn: neither commutes with nor equals S_1's root.
        (([0, 0], np.diag([1.0, 9])), ([0, 0], np.diag([9.0, 1])), 2 * (1 - 3) ** 2),
        (([0, 0], [[2.0, 1], [1, 2]]), ([0, 0], np.eye(2)), (3**0.5 - 1) ** 2),
    ],
)
def test_frechet_distance_of_known_gaussians(first, second, distance):
    assert frechet_distance(gaussian(*first), gaussian(*second)) == pytest.approx(distance)


def test_fewer_samples_than_dimensions_still_measure():
    few = np.random.default_rng(0).standard_normal((5, 64))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)
    assert frechet_distance(few, few + 1) == pytest.approx(64)


@pytest.mark.parametrize("shapes", [((1, 4), (9, 4)), ((9, 4), (1, 4)), ((9, 4), (9, 5))])
def test_what_cannot_be_compared_is_refused(shapes):
    first, second = (np.zeros(shape) for shape in shapes)
    with pytest.raises(EvaluationError, match=r"\[9, 4\].*give at least 2 of each"):
        frechet_distance(first, second)


def test_samples_of_a_diverged_network_are_an_error():
    features = np.random.default_rng(0).standard_normal((10, 3))
    with pytest.raises(EvaluationError, match="nan or inf"):
        frechet_distance(np.full((10, 3), np.nan), features)


def test_precision_recall_and_inception_score_equal_the_published_code():
    generated, reference = GOLDEN["generated_features"], GOLDEN["reference_features"]
    expected = float(GOLDEN["precision"]), float(GOLDEN["recall"])
    for block in (7, 128, 4096):  # blocks that fit neither set, and one that holds both
        found = precision_recall(reference, generated, int(GOLDEN["k"]), block=block)
        assert found == pytest.approx(expected, rel=1e-6)
    # The golden score is of one split.
    score, deviation = inception_score(GOLDEN["class_probabilities"], splits=1)
    assert score == pytest.approx(float(GOLDEN["inception_score"]), rel=1e-6)
    assert deviation == 0


@pytest.mark.parametrize("layout", ["near", "far apart", "fewer samples than features", "float32"])
def test_metrics_equal_torch_fidelity_on_the_same_features(layout):
    random = np.random.default_rng(0)
    num, width = (40, 64) if layout.startswith("fewer") else (300, 24)
    mixing = random.standard_normal((width, width)) / width**0.5
    real = random.standard_normal((num, width)) @ mixing
    spread = np.linspace(0.2, 1.5, width)  # too narrow in some directions, too wide in others
    made = random.standard_normal((num - 9, width)) * spread @ mixing + 0.1
    if layout == "far apart":
        real, made = real + 50, made + 50
    if layout == "float32":
        real, made = real.astype(np.float32), made.astype(np.float32)
    tensors = [torch.from_numpy(made), torch.from_numpy(real)]

    theirs = fid_statistics_to_metric(*map(fid_features_to_statistics, tensors), verbose=False)
    assert frechet_distance(made, real) == pytest.approx(*theirs.values(), rel=1e-4)

    expected = calculate_precision_recall_full(*(t.double() for t in tensors), neighborhood=3)
    assert precision_recall(real, made) == pytest.approx(expected, abs=1e-6)
    assert min(expected) > 0.1 and max(expected) < 1

    scores = isc_features_to_metric(tensors[0] * 4, splits=10, shuffle=False)
    ours = inception_score((tensors[0].double() * 4).softmax(dim=1).numpy())
    assert ours == pytest.approx(tuple(scores.values()), rel=1e-4)


def test_moments_of_parts_are_those_of_the_whole(monkeypatch):
    features = np.random.default_rng(0).standard_normal((100, 5)) * 1e-3 + 1e3
    running = RunningMoments()
    monkeypatch.setattr("dtr_scale.evaluation.metrics._BLOCK", 30)  # merges in between
    for start, end in [(0, 1), (1, 40), (40, 42), (42, 90), (90, 100)]:
        running.add(features[start:end])
    whole, parts = moments(features), running.result()
    np.testing.assert_allclose(parts.mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(parts.covariance, np.cov(features, rowvar=False), rtol=1e-8)
    assert moments_distance(whole, parts) == pytest.approx(0, abs=1e-12)
    with pytest.raises(EvaluationError, match="2 features with those of 5"):
        moments_distance(Moments(np.zeros(2), np.eye(2)), whole)


def test_sfid_is_the_same_distance_as_adm_takes():
    """ADM's evaluator takes scipy's square root of S_1 S_2, here of [n, h, w, 7] as it lies."""
    random = np.random.default_rng(0)
    spatial = [(random.standard_normal((400, 5, 5, 7)) * s).reshape(400, -1) for s in (1, 1.3)]
    (mean_1, cov_1), (mean_2, cov_2) = (moments(each) for each in spatial)
    root = np.real(np.asarray(sqrtm(cov_1 @ cov_2)))
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * root)
    assert frechet_distance(*spatial) == pytest.approx(expected, rel=1e-6)


def test_what_precision_and_recall_mean():
    random = np.random.default_rng(0)
    cloud, elsewhere = random.standard_normal((200, 4)), random.standard_normal((200, 4)) + 100
    assert precision_recall(cloud, elsewhere) == (0, 0)
    assert precision_recall(cloud, cloud) == (1, 1)
    # One mode of two: all that is generated is real, half of what is real is generated.
    assert precision_recall(np.concatenate([cloud, elsewhere]), cloud) == (1, 0.5)
    # k of identical samples have balls without a size, which hold themselves alone.
    assert precision_recall(cloud, np.zeros((10, 4)) + cloud[0])[1] == 1 / 200
    with pytest.raises(EvaluationError, match="k = 3; give at least 4 of each"):
        precision_recall(cloud, cloud[:3])


def test_what_the_inception_score_means():
    sure, unsure = np.eye(5).repeat(20, axis=0), np.full((100, 5), 0.2)
    assert inception_score(sure, splits=1) == pytest.approx((5, 0))
    assert inception_score(sure, splits=5) == pytest.approx((1, 0))  # one class in each split
    assert inception_score(unsure) == pytest.approx((1, 0))
    with pytest.raises(EvaluationError, match="sum to 1; give a softmax"):
        inception_score(unsure * 2)
    with pytest.raises(EvaluationError, match=r"splits = 10 of 9 samples"):
        inception_score(unsure[:9])
