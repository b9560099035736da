"""Compare sets of pictures by ADM's protocol, with what was computed of them kept on disk.

A reference file holds two references (guided-diffusion's evaluations): the moments of a whole
training set, for FID and sFID, and some of its pictures, for precision and recall.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.features import Extractor, Features, Inception
from dtr_scale.evaluation.kept import kept_arrays
from dtr_scale.evaluation.metrics import (
    Moments,
    RunningMoments,
    inception_score,
    moments_distance,
    precision_recall,
)
from dtr_scale.evaluation.pictures import ARRAY, NpzPictures, Pictures
from dtr_scale.storage.local import replacing

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
        Moments(arrays["mu"], arrays["sigma"]),
        Moments(arrays["mu_s"], arrays["sigma_s"]) if "mu_s" in arrays else None,
        arrays["pooled"],
        None if score is None else (float(score[0]), float(score[1])),
    )


def _measured(pictures: Pictures, extractor: Extractor) -> dict[str, np.ndarray]:
    sums = _Sums()
    pooled, probabilities = [], []
    for batch in _told(pictures, extractor.batch_size, extractor.name):
        features = extractor.features(batch)
        sums.add(features)
        pooled.append(features.pooled)
        if features.probabilities is not None:
            probabilities.append(features.probabilities)
    arrays = {**sums.moments(), "pooled": np.concatenate(pooled)}
    if probabilities:
        splits = max(1, len(pictures) // SPLIT_SAMPLES)
        score = inception_score(np.concatenate(probabilities), splits)
        arrays["inception_score"] = np.array(score)
    return arrays


class _Sums:
    """Moments of the features of a set of any size, by the names that ADM's files have."""

    def __init__(self) -> None:
        self._pooled, self._spatial = RunningMoments(), RunningMoments()
        self._has_spatial = False

    def add(self, features: Features) -> None:
        self._pooled.add(features.pooled)
        if features.spatial is not None:
            self._has_spatial = True
            self._spatial.add(features.spatial)

    def moments(self) -> dict[str, np.ndarray]:
        pooled = self._pooled.result()
        arrays = {"mu": pooled.mean, "sigma": pooled.covariance}
        if self._has_spatial:
            spatial = self._spatial.result()
            arrays |= {"mu_s": spatial.mean, "sigma_s": spatial.covariance}
        return arrays


def _told(pictures: Pictures, batch_size: int, what: str) -> Iterator[np.ndarray]:
    """Yield the batches of pictures, and show how far it is."""
    with tqdm(total=len(pictures), desc=what, leave=False, disable=None) as bar:
        for batch in pictures.batches(batch_size):
            yield batch
            bar.update(len(batch))


def compare(samples: Measured, reference: "Reference", extractor: Extractor) -> dict[str, float]:
    """Return the metrics of samples against a reference.

    Of Inception they are `fid`, `sfid`, `inception_score` (with `_std`), `precision` and `recall`;
    of another extractor `fd_NAME`, `precision_NAME` and `recall_NAME`.
    """
    inception = extractor.name == Inception.name
    ending = "" if inception else f"_{extractor.name}"
    moments, spatial = reference.moments(extractor)
    distance = moments_distance(samples.moments, moments)
    metrics = {"fid" if inception else f"fd{ending}": distance}
    if samples.spatial is not None and spatial is not None:
        metrics["sfid"] = moments_distance(samples.spatial, spatial)
    if samples.inception_score is not None:
        metrics["inception_score"], metrics["inception_score_std"] = samples.inception_score
    pooled = reference.measured(extractor).pooled
    metrics[f"precision{ending}"], metrics[f"recall{ending}"] = precision_recall(
        pooled, samples.pooled, NEIGHBOURS
    )
    return metrics


class Reference:
    """Pictures that samples are compared with."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        """Those for precision and recall."""

    def measured(self, extractor: Extractor) -> Measured:
        """Return what an extractor tells of the pictures."""
        return measure(self.pictures, extractor)

    def moments(self, extractor: Extractor) -> tuple[Moments, Moments | None]:
        """Return the moments of pooled and of spatial features."""
        measured = self.measured(extractor)
        return measured.moments, measured.spatial

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
    sums = [_Sums() for _ in extractors]
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
        for name, array in of_it.moments().items():
            arrays[f"{name}{_ending(extractor)}"] = array
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
