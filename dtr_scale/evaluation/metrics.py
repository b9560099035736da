"""Measure sets of samples: distances between features, and whether classes can be recognised."""

import numpy as np

from dtr_scale.errors import EvaluationError


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Return the Fréchet distance between Gaussians fitted to two sets [n, d] and [m, d].

    |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)) (Heusel et al., 2017), S with n - 1.
    Raises EvaluationError for fewer than two samples or different d.
    """
    if min(len(features), len(reference)) < 2 or features.shape[1:] != reference.shape[1:]:
        raise EvaluationError(
            f"cannot compare features {list(features.shape)} with {list(reference.shape)}; "
            "give at least 2 of each, of the same length"
        )
    if not (np.isfinite(features).all() and np.isfinite(reference).all()):
        raise EvaluationError(
            "features hold nan or inf; the network that made the samples has diverged"
        )
    mean_1, cov_1 = _moments(features)
    mean_2, cov_2 = _moments(reference)
    # tr (S_1 S_2)^(1/2) from the symmetric S_1^(1/2) S_2 S_1^(1/2), which has the same eigenvalues.
    root_1 = _symmetric_root(cov_1)
    eigenvalues = np.linalg.eigvalsh(root_1 @ cov_2 @ root_1)
    # Rounding makes some of the zero eigenvalues negative: with fewer samples than features there
    # are many.
    trace_root = np.sqrt(np.clip(eigenvalues, 0.0, None)).sum()
    shift = ((mean_1 - mean_2) ** 2).sum()
    return float(shift + np.trace(cov_1) + np.trace(cov_2) - 2.0 * trace_root)


def legibility(
    images: np.ndarray, asked: np.ndarray, real_images: np.ndarray, real_labels: np.ndarray
) -> float:
    """Return the share of `images` [n, C, H, W] recognised as the class `asked` [n].

    The judge is a support vector machine fitted to real pictures [m, C, H, W] and labels [m];
    it suits small pictures. Raises EvaluationError where scikit-learn is not installed.
    """
    try:
        from sklearn.svm import SVC
    except ModuleNotFoundError:
        raise EvaluationError(
            "legibility needs scikit-learn; install it with pip install 'dtr-scale[eval]'"
        ) from None
    if len(np.unique(real_labels)) < 2:
        raise EvaluationError("legibility needs pictures of two classes or more")
    judge = SVC().fit(real_images.reshape(len(real_images), -1), real_labels)
    return float((judge.predict(images.reshape(len(images), -1)) == asked).mean())


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # fp64: the distance is a small difference of traces. np.cov gives a scalar for one feature.
    features = features.astype(np.float64)
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
