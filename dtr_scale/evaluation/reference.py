"""Compare sets of pictures by ADM's protocol, with what was computed of them kept on disk.

A reference file holds two references (guided-diffusion's evaluations): the moments of a whole
training set, for FID and sFID, and some of its pictures, for precision and recall.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.features import Extractor, Features, Inception
from dtr_scale.evaluation.kept import is_kept, kept_arrays
from dtr_scale.evaluation.metrics import (
    Moments,
    RunningMoments,
    inception_score,
    moments_distance,
    precision_recall,
)
from dtr_scale.evaluation.pictures import ARRAY, NpzPictures, Pictures
from dtr_scale.logs import ProgressBar
from dtr_scale.storage.local import replacing

log = logging.getLogger(__name__)

NEIGHBOURS = 3  # of precision and recall
SPLIT_SAMPLES = 5000  # of the Inception Score
MANIFEST = "manifest"


class Measured(NamedTuple):
    """What the metrics need to know of a set of pictures."""

    moments: Moments
    spatial: Moments | None
    pooled: np.ndarray
    """Features, float32 [N, D]."""
    inception_score: tuple[float, float] | None


def measure(pictures: Pictures, extractor: Extractor) -> Measured:
    """Return what an extractor tells of a set of pictures; what was computed before is read."""
    depends_on = [pictures.sha256, extractor.record(), SPLIT_SAMPLES]
    arrays = kept_arrays(depends_on, lambda: _measured(pictures, extractor))
    score = arrays.get("inception_score")
    return Measured(
        *_moments(arrays),
        arrays["pooled"],
        None if score is None else (float(score[0]), float(score[1])),
    )


def _measured(pictures: Pictures, extractor: Extractor) -> dict[str, np.ndarray]:
    batches = _told(pictures, extractor.batch_size, extractor.name)
    found = summary(extractor.features(batch) for batch in batches)
    arrays = {**_arrays(found.moments, found.spatial), "pooled": found.pooled}
    if found.inception_score is not None:
        arrays["inception_score"] = np.array(found.inception_score)
    return arrays


def summary(parts: Iterable[Features]) -> Measured:
    """Return what the metrics need to know of pictures whose features come in parts."""
    sums = FeatureSums()
    pooled, probabilities = [], []
    for features in parts:
        sums.add(features)
        pooled.append(features.pooled)
        if features.probabilities is not None:
            probabilities.append(features.probabilities)
    score = None
    if probabilities:
        splits = max(1, sum(map(len, pooled)) // SPLIT_SAMPLES)
        score = inception_score(np.concatenate(probabilities), splits)
    return Measured(*sums.moments(), np.concatenate(pooled), score)


class FeatureSums:
    """Moments of the features of a set of any size."""

    def __init__(self) -> None:
        self._pooled, self._spatial = RunningMoments(), RunningMoments()
        self._has_spatial = False

    def add(self, features: Features) -> None:
        self._pooled.add(features.pooled)
        if features.spatial is not None:
            self._has_spatial = True
            self._spatial.add(features.spatial)

    def moments(self) -> tuple[Moments, Moments | None]:
        """Return the moments of pooled and of spatial features."""
        return self._pooled.result(), self._spatial.result() if self._has_spatial else None


def _arrays(pooled: Moments, spatial: Moments | None, ending: str = "") -> dict[str, np.ndarray]:
    """Return moments by the names that ADM's files have."""
    arrays = {f"mu{ending}": pooled.mean, f"sigma{ending}": pooled.covariance}
    if spatial is not None:
        arrays |= {f"mu_s{ending}": spatial.mean, f"sigma_s{ending}": spatial.covariance}
    return arrays


def _moments(arrays: dict[str, np.ndarray]) -> tuple[Moments, Moments | None]:
    spatial = Moments(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None
    return Moments(arrays["mu"], arrays["sigma"]), spatial


def _told(pictures: Pictures, batch_size: int, what: str) -> Iterator[np.ndarray]:
    """Yield the batches of pictures, and show how far it is."""
    with ProgressBar(what, len(pictures)) as bar:
        for batch in pictures.batches(batch_size):
            yield batch
            bar.advance(len(batch))


def compare(samples: Measured, reference: "Reference", extractor: Extractor) -> dict[str, float]:
    """Return the metrics of samples against a reference.

    Those of `distances`, and of Inception `precision` and `recall`, of another extractor
    `precision_NAME` and `recall_NAME`.
    """
    ending = _ending(extractor)
    pooled = reference.measured(extractor).pooled
    precision, recall = precision_recall(pooled, samples.pooled, NEIGHBOURS)
    return {
        **distances(samples, reference, extractor),
        f"precision{ending}": precision,
        f"recall{ending}": recall,
    }


def distances(samples: Measured, reference: "Reference", extractor: Extractor) -> dict[str, float]:
    """Return the metrics that need the moments of a reference alone.

    Of Inception they are `fid`, `sfid` and `inception_score` (with `_std`), of another extractor
    `fd_NAME`.
    """
    moments, spatial = reference.moments(extractor)
    metrics = {extractor.distance_name: moments_distance(samples.moments, moments)}
    if samples.spatial is not None and spatial is not None:
        metrics["sfid"] = moments_distance(samples.spatial, spatial)
    if samples.inception_score is not None:
        metrics["inception_score"], metrics["inception_score_std"] = samples.inception_score
    return metrics


def warn_of_sizes(shape: Sequence[int], reference: "Reference") -> None:
    """Tell where samples [C, H, W] and the pictures of their reference differ in size."""
    theirs = reference.pictures.shape
    if tuple(shape) != theirs:
        log.warning(
            "samples are %s, the pictures of %s are %s: a distance between sizes is another number",
            list(shape), reference.pictures.source, list(theirs),
        )  # fmt: skip


class Reference:
    """Pictures that samples are compared with."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        """Those for precision and recall."""
        self._known: dict[str, tuple[Moments, Moments | None]] = {}

    def measured(self, extractor: Extractor) -> Measured:
        """Return what an extractor tells of the pictures."""
        return measure(self.pictures, extractor)

    def moments(self, extractor: Extractor) -> tuple[Moments, Moments | None]:
        """Return the moments of pooled and of spatial features, once they are known from disk."""
        if extractor.name not in self._known:
            measured = self.measured
            self.keep_moments(extractor, lambda: measured(extractor)[:2])
        return self._known[extractor.name]

    def has_moments(self, extractor: Extractor) -> bool:
        """Tell whether `moments` are known without a look at the pictures."""
        return extractor.name in self._known or is_kept(self._depends_on(extractor))

    def keep_moments(
        self, extractor: Extractor, compute: Callable[[], tuple[Moments, Moments | None]]
    ) -> None:
        """Keep the moments of all pictures, computed unless they are known."""
        arrays = kept_arrays(self._depends_on(extractor), lambda: _arrays(*compute()))
        self._known[extractor.name] = _moments(arrays)

    def _depends_on(self, extractor: Extractor) -> list[Any]:
        return [self.pictures.sha256, extractor.record(), "moments"]

    def record(self, extractor: Extractor) -> dict[str, Any]:
        """Return what a manifest tells of the reference of an extractor's numbers."""
        return {
            "source": self.pictures.source,
            "sha256": self.pictures.sha256,
            "moments_of": f"the {len(self.pictures)} pictures",
            "num_pictures": len(self.pictures),
            "shape": list(self.pictures.shape),
        }


class ReferenceFile(Reference):
    """A file in ADM's format: mu, sigma, mu_s, sigma_s and the pictures arr_0.

    Moments of other extractors than Inception stand beside them as mu_NAME and sigma_NAME. What a
    file does not hold is computed of its pictures.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(NpzPictures(path))
        self.path = path
        with np.load(path) as stored:
            names = [name for name in stored.files if name.startswith(("mu", "sigma"))]
            self._moments = {name: stored[name] for name in names}
            told = str(stored[MANIFEST]) if MANIFEST in stored.files else "{}"
        self._manifest: dict[str, Any] = json.loads(told)  # of our own files; ADM's have none

    def moments(self, extractor: Extractor) -> tuple[Moments, Moments | None]:
        """Return the moments of the whole set; EvaluationError for those of other weights."""
        if not self._has_moments(extractor):
            return super().moments(extractor)
        told = self._manifest.get("extractors", {}).get(extractor.name)
        if told is not None and told["weights_sha256"] != extractor.weights_sha256:
            raise EvaluationError(
                f"{self.path} was made with weights {told['weights_sha256'][:12]} of "
                f"{extractor.name}, these are {extractor.weights_sha256[:12]}; make it again with "
                "dtr-scale evaluate reference, or give the weights it was made with"
            )
        ending = _ending(extractor)
        pooled = self._stored(ending)
        has_spatial = not ending and "mu_s" in self._moments
        return pooled, self._stored("_s") if has_spatial else None

    def has_moments(self, extractor: Extractor) -> bool:
        return self._has_moments(extractor) or super().has_moments(extractor)

    def record(self, extractor: Extractor) -> dict[str, Any]:
        record = {**super().record(extractor), **self._manifest}
        if self._has_moments(extractor):
            record["moments_of"] = "the whole set"
        return record

    def _has_moments(self, extractor: Extractor) -> bool:
        return f"mu{_ending(extractor)}" in self._moments

    def _stored(self, ending: str) -> Moments:
        mean = self._moments[f"mu{ending}"].astype(np.float64)
        covariance = self._moments.get(f"sigma{ending}", np.zeros(0)).astype(np.float64)
        if mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
            raise EvaluationError(
                f"{self.path}: mu{ending} {list(mean.shape)} and sigma{ending} "
                f"{list(covariance.shape)} do not belong together; make the file again"
            )
        return Moments(mean, covariance)


def write_reference(
    path: Path,
    pictures: Pictures,
    extractors: Sequence[Extractor],
    *,
    num_pictures: int,
    manifest: dict[str, Any],
) -> None:
    """Write the moments of all pictures, and `num_pictures` of them, evenly spread, as a reference.

    The pictures are read once. `manifest` is told of where they are from.
    """
    batch_size = max(extractor.batch_size for extractor in extractors)
    sums = [FeatureSums() for _ in extractors]
    num_pictures = min(num_pictures, len(pictures))
    chosen = np.zeros(len(pictures), bool)
    chosen[np.arange(num_pictures) * len(pictures) // num_pictures] = True
    kept, start = [], 0
    for batch in _told(pictures, batch_size, "reference"):
        for extractor, of_it in zip(extractors, sums, strict=True):
            of_it.add(extractor.features(batch))
        kept.append(batch[chosen[start : start + len(batch)]].transpose(0, 2, 3, 1))
        start += len(batch)
    arrays = {ARRAY: np.concatenate(kept)}
    for extractor, of_it in zip(extractors, sums, strict=True):
        arrays |= _arrays(*of_it.moments(), _ending(extractor))
    told = {
        **manifest,
        "set_pictures": len(pictures),
        "extractors": {each.name: each.record() for each in extractors},
    }
    arrays[MANIFEST] = np.array(json.dumps(told))
    # Whole or not at all: it may have taken hours to compute.
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def _ending(extractor: Extractor) -> str:
    return "" if extractor.name == Inception.name else f"_{extractor.name}"
