"""Distances and legibility give the known answers."""

import sys
from pathlib import Path

import numpy as np
import pytest

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.metrics import frechet_distance, legibility
from dtr_scale.prepare.digits import digits

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


@pytest.fixture(scope="module")
def pictures():
    splits = digits().splits
    return {
        name: (np.array([row.array for row in rows]), np.array([row.label for row in rows]))
        for name, rows in splits.items()
    }


def test_real_digits_are_legible_and_noise_is_not(pictures):
    (real, labels), (held_out, asked) = pictures["train"], pictures["val"]
    assert legibility(held_out, asked, real, labels) > 0.9
    assert legibility(held_out, (asked + 1) % 10, real, labels) < 0.05
    noise = np.random.default_rng(0).uniform(0, 16, held_out.shape)
    assert legibility(noise, asked, real, labels) < 0.3


def test_legibility_without_scikit_learn_names_the_fix(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(EvaluationError, match=r"pip install 'dtr-scale\[eval\]'"):
        legibility(*pictures["val"], *pictures["train"])


def test_samples_of_a_diverged_network_are_an_error():
    features = np.random.default_rng(0).standard_normal((10, 3))
    with pytest.raises(EvaluationError, match="nan or inf"):
        frechet_distance(np.full((10, 3), np.nan), features)
