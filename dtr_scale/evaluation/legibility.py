"""Tell whether samples show the class that was asked for."""

import numpy as np

from dtr_scale.errors import EvaluationError


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
