"""Real pictures are legible, and others are not."""

import sys

import numpy as np
import pytest

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.legibility import legibility
from dtr_scale.prepare.digits import digits


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
