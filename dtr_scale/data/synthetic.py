"""Make up samples on the fly, for runs without data."""

from collections.abc import Callable, Sequence

import numpy as np

from dtr_scale.data.manifest import Manifest
from dtr_scale.data.reader import Replaced, Sample, Views
from dtr_scale.randomness import keyed_generator


class SyntheticSource:
    """Made-up samples for runs without data, read like the shards of a split.

    Sample i is a standard normal array and a class index, or text tokens where a `context_shape`
    is given, all keyed by (seed, i).
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        num_samples: int,
        seed: int = 0,
        context_shape: tuple[int, int] | None = None,
    ) -> None:
        self.manifest = Manifest(
            encoding="pixels",
            shape=shape,
            dtype="float32",
            num_classes=num_classes,
            context_shape=context_shape,
            shards=(),
        )
        self.shard_samples = (num_samples,)
        self.replaced: list[Replaced] = []
        self._seed = seed

    def read(self, shard: int, index: int) -> Sample:
        """Return (array float32 [C, H, W], class index or tokens) of a sample."""
        generator = keyed_generator(self._seed, "synthetic", index)
        label = int(generator.integers(self.manifest.num_classes))
        array = generator.standard_normal(self.manifest.shape, dtype=np.float32)
        if self.manifest.context_shape is None:
            return array, label
        return array, generator.standard_normal(self.manifest.context_shape, dtype=np.float32)

    def read_views(self, located: np.ndarray, mirrored: np.ndarray, caption: np.ndarray) -> Views:
        """Return the samples at `located` int [n, 2]."""
        stored, conditions = zip(*(self.read(*place) for place in located.tolist()), strict=True)
        return Views(np.stack(stored), np.stack(conditions))

    def null_condition(self) -> np.ndarray:
        """Return zeros, float32 [L, D]."""
        return np.zeros(self.manifest.context_shape or (), np.float32)

    def prefetch(self, wanted: Sequence[int], next_uses: Callable[[], Sequence[int]]) -> None:
        """Nothing has to be fetched."""

    def close(self) -> None:
        """Nothing is open."""
