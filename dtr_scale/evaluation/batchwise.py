"""Measure samples batch by batch as they are drawn, and compare all of them in the end."""

import io
import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dtr_scale.data.reader import Samples
from dtr_scale.evaluation.features import Extractor, Features
from dtr_scale.evaluation.grid import Titles, num_shown, save_level_grid
from dtr_scale.evaluation.pictures import to_uint8
from dtr_scale.evaluation.reference import Reference, distances, summary, warn_of_sizes
from dtr_scale.evaluation.report import pixel_frechet_distance, read_all

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

_SAMPLES, _GRID = "x_start", "grid"


class BatchMeasure:
    """What is kept of samples, and measured of it in the end.

    With `decode`, which makes pictures [n, C, H, W] in [-1, 1] of samples, they are shown, and
    measured by the features of `extractors` against `reference`; with `held_out`, samples of small
    pictures, by their pixels. Without a decoder the samples are kept as they are.
    """

    def __init__(
        self,
        *,
        decode: Callable[[Tensor], Tensor] | None,
        titles: Titles | None = None,
        held_out: Samples | None = None,
        extractors: Sequence[Extractor] = (),
        reference: Reference | None = None,
    ) -> None:
        self.extractors = extractors
        self.reference = reference
        self._decode = decode
        self._titles = titles
        self._held_out = held_out

    @property
    def metric(self) -> str | None:
        """The number by which checkpoints are compared; None if nothing is measured."""
        if self._held_out is not None:
            return "pixel_frechet_distance"
        return self.extractors[0].distance_name if self.extractors else None

    @property
    def ending(self) -> str:
        """Of the file that `picture` fills."""
        return ".png" if self._decode else ".npz"

    def reduce(self, x_start: Tensor, indices: range) -> Arrays:
        """Return what is kept of samples [n, C, H, W], those of `indices`."""
        if self._decode is None:
            return {_SAMPLES: x_start.numpy()}
        decoded = self._decode(x_start)
        pictures = to_uint8(decoded).numpy()
        arrays: Arrays = {}
        if self._held_out is not None:
            arrays[_SAMPLES] = x_start.numpy()
        # Every batch keeps what of the first samples is in it; joined in order they are the grid.
        if (shown := self._num_shown(pictures.shape[-2]) - indices.start) > 0:
            arrays[_GRID] = pictures[:shown]
        for extractor in self.extractors:
            parts = [
                extractor.features(pictures[i : i + extractor.batch_size])
                for i in range(0, len(pictures), extractor.batch_size)
            ]
            arrays |= _stored(extractor, Features.joined(parts))
        return arrays

    def metrics(self, arrays: Arrays) -> dict[str, float]:
        """Return the metrics of all samples, from what was kept of them in their order."""
        metrics: dict[str, float] = {}
        if self._held_out is not None:
            reference, _ = read_all(self._held_out)
            metrics["pixel_frechet_distance"] = pixel_frechet_distance(arrays[_SAMPLES], reference)
        if self.reference is not None:
            warn_of_sizes(arrays[_GRID].shape[1:], self.reference)
            for extractor in self.extractors:
                samples = summary([_features(extractor, arrays)])
                metrics |= distances(samples, self.reference, extractor)
        return metrics

    def picture(self, arrays: Arrays) -> memoryview:
        """Return the content of a PNG of the first samples, or of an .npz of all of them."""
        file = io.BytesIO()
        if _GRID in arrays:
            save_level_grid(file, torch.from_numpy(arrays[_GRID]), titles=self._titles)
        else:
            np.savez(file, latents=arrays[_SAMPLES])
        return file.getbuffer()

    def _num_shown(self, height: int) -> int:
        return num_shown(height, self._titles.period if self._titles else 0)


def _stored(extractor: Extractor, features: Features) -> Arrays:
    found = features._asdict().items()
    return {f"{extractor.name}.{name}": value for name, value in found if value is not None}


def _features(extractor: Extractor, arrays: Arrays) -> Features:
    pooled, *others = (f"{extractor.name}.{name}" for name in Features._fields)
    return Features(arrays[pooled], *map(arrays.get, others))
