"""Compute the distances and scores of image generation from features, in float64.

Nothing here knows how features are made (`dtr_scale.evaluation.features`) or what they are called.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dtr_scale.errors import EvaluationError

_BLOCK = 4096  # rows and columns of a block of distances, 134 MB


class Moments(NamedTuple):
    """Mean [D] and covariance [D, D] (by n - 1) of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


class RunningMoments:
    """Moments of features that come in parts, of a set too large for memory."""

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))  # sum of outer products around the mean
        self._waiting: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Take in features [n, D]."""
        self._waiting.append(features)
        # A merge costs D x D however few they are.
        if sum(map(len, self._waiting)) >= _BLOCK:
            self._merge()

    def result(self) -> Moments:
        """Return the moments; EvaluationError for fewer than two samples, nan and inf."""
        self._merge()
        if self.count < 2:
            raise EvaluationError(
                f"features of {self.count} samples have no covariance; give at least 2"
            )
        _check_finite(self._scatter)
        return Moments(self._mean, self._scatter / (self.count - 1))

    def _merge(self) -> None:
        if not self._waiting:
            return
        part = np.concatenate(self._waiting).astype(np.float64)
        self._waiting.clear()
        mean = part.mean(axis=0)
        part -= mean
        scatter = part.T @ part
        if not self.count:
            self.count, self._mean, self._scatter = len(part), mean, scatter
            return
        # Chan et al. (1983). Sums of squares without a mean taken off would lose digits.
        total = self.count + len(part)
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift * (self.count * len(part) / total))
        self._mean += shift * (len(part) / total)
        self.count = total


def moments(features: np.ndarray) -> Moments:
    """Return the moments of features [n, D]."""
    running = RunningMoments()
    running.add(features)
    return running.result()


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets [n, D] and [m, D].

    Raises EvaluationError for fewer than two samples or different D.
    """
    if min(len(features_a), len(features_b)) < 2 or features_a.shape[1:] != features_b.shape[1:]:
        raise EvaluationError(
            f"cannot compare features {list(features_a.shape)} with {list(features_b.shape)}; "
            "give at least 2 of each, of the same length"
        )
    return moments_distance(moments(features_a), moments(features_b))


def moments_distance(a: Moments, b: Moments) -> float:
    """Return the Fréchet distance between two Gaussians; EvaluationError for different D.

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al., 2017).
    """
    if a.mean.shape != b.mean.shape:
        raise EvaluationError(
            f"cannot compare moments of {len(a.mean)} features with those of {len(b.mean)}; "
            "give moments of the same features"
        )
    # tr (S_1 S_2)^(1/2) from the symmetric S_1^(1/2) S_2 S_1^(1/2), which has the same eigenvalues.
    root = _symmetric_root(a.covariance)
    eigenvalues = np.linalg.eigvalsh(root @ b.covariance @ root)
    # Rounding makes some of the zero eigenvalues negative: with fewer samples than features there
    # are many.
    trace_root = np.sqrt(np.clip(eigenvalues, 0.0, None)).sum()
    shift = ((a.mean - b.mean) ** 2).sum()
    return float(shift + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * trace_root)


def precision_recall(
    reference: np.ndarray, generated: np.ndarray, k: int = 3, *, block: int = _BLOCK
) -> tuple[float, float]:
    """Return precision and recall (Kynkäänniemi et al., 2019) of features [N, D] and [M, D].

    Precision is the share of the generated that lie in the reference's manifold, recall that of the
    reference in the generated one's. A manifold is the union of balls around the samples that reach
    their k-th nearest neighbour, borders included. No more than `block` x `block` distances are
    held at a time, so 50,000 x 10,000 fit. Raises EvaluationError for k samples or fewer.
    """
    if min(len(reference), len(generated)) <= k or reference.shape[1:] != generated.shape[1:]:
        raise EvaluationError(
            f"no precision and recall of features {list(reference.shape)} and "
            f"{list(generated.shape)} with k = {k}; give at least {k + 1} of each, of one length"
        )
    for features in (reference, generated):
        _check_finite(features)
    # Distances are those of |a|^2 + |b|^2 - 2 a b, which loses digits far from the origin.
    centre = reference.mean(axis=0, dtype=np.float64)
    reach = [_squared_radii(features, centre, k, block) for features in (reference, generated)]
    recalled, precise = np.zeros(len(reference), bool), np.zeros(len(generated), bool)
    for rows, real in _blocks(reference, centre, block):
        for columns, made in _blocks(generated, centre, block):
            distances = _squared_distances(real, made)
            precise[columns] |= (distances <= reach[0][rows, None]).any(axis=0)
            recalled[rows] |= (distances <= reach[1][columns]).any(axis=1)
    return float(precise.mean()), float(recalled.mean())


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """Return mean and standard deviation over splits of exp(E KL(p(y|x) || p(y))).

    Of class probabilities [N, K] (Salimans et al., 2016), in their order: splits are N / splits
    neighbours. Raises EvaluationError for rows that do not sum to 1 and more splits than samples.
    """
    if not 1 <= splits <= len(probabilities):
        raise EvaluationError(
            f"splits = {splits} of {len(probabilities)} samples is not accepted; "
            "give 1 to the number of samples"
        )
    _check_finite(probabilities)
    if (probabilities < 0).any() or abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
        raise EvaluationError("class probabilities must be from 0 and sum to 1; give a softmax")
    scores = []
    borders = [split * len(probabilities) // splits for split in range(splits + 1)]
    for start, end in pairwise(borders):
        p = probabilities[start:end].astype(np.float64)
        marginal = p.mean(axis=0)
        divergence = (p * (_log(p) - _log(marginal))).sum(axis=1).mean()
        scores.append(np.exp(divergence))
    return float(np.mean(scores)), float(np.std(scores))


def _log(p: np.ndarray) -> np.ndarray:
    # 0 log 0 is 0: what multiplies this is 0 where p is.
    return np.log(np.maximum(p, np.finfo(np.float64).tiny))


def _squared_radii(features: np.ndarray, centre: np.ndarray, k: int, block: int) -> np.ndarray:
    """Return the squared distance of each of features [n, D] to its k-th nearest other one, [n]."""
    radii = np.empty(len(features))
    for rows, these in _blocks(features, centre, block):
        nearest = np.empty((len(these), 0))
        for _, others in _blocks(features, centre, block):
            nearest = np.concatenate([nearest, _squared_distances(these, others)], axis=1)
            if nearest.shape[1] > k + 1:
                # One more than k: a sample is its own nearest.
                nearest = np.partition(nearest, k, axis=1)[:, : k + 1]
        radii[rows] = nearest.max(axis=1)
    return radii


def _blocks(
    features: np.ndarray, centre: np.ndarray, block: int
) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(features), block):
        rows = slice(start, min(start + block, len(features)))
        yield rows, features[rows].astype(np.float64) - centre


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the squared distances [n, m] between rows [n, D] and [m, D]."""
    distances = a @ b.T
    distances *= -2.0
    distances += (a * a).sum(axis=1)[:, None]
    distances += (b * b).sum(axis=1)
    return distances


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


def _check_finite(numbers: np.ndarray) -> None:
    if not np.isfinite(numbers).all():
        raise EvaluationError(
            "features hold nan or inf; the network that made the samples has diverged"
        )
