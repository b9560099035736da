"""Where samples come from: pictures to be written as shards, and samples made up on the fly."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dtr_scale.data.ledger import PLAN_NAME
from dtr_scale.data.manifest import MANIFEST_NAME, Manifest, write_manifest
from dtr_scale.data.reader import Sample, Views
from dtr_scale.data.shards import StoredSample, write_shards
from dtr_scale.errors import ConfigError
from dtr_scale.randomness import keyed_generator
from dtr_scale.storage import Folder


@dataclass(frozen=True)
class Source:
    """Arrays with labels, by split, and what a manifest says about them."""

    encoding: Literal["pixels", "posterior"]
    shape: tuple[int, int, int]
    dtype: Literal["uint8", "float16"]
    scale_factor: float
    shift: float
    class_names: tuple[str, ...]
    splits: Mapping[str, Iterable[StoredSample]]


def prepare(source: Source, folder: Folder, samples_per_shard: int) -> Manifest:
    """Write the shards of every split of a source, then the manifest, and return it.

    Raises ConfigError when the folder holds other data.
    """
    plan = Manifest(
        encoding=source.encoding,
        shape=source.shape,
        dtype=source.dtype,
        scale_factor=source.scale_factor,
        shift=source.shift,
        num_classes=len(source.class_names),
        class_names=source.class_names,
        shards=(),
    )
    _must_not_hold_other_data(folder, plan)
    shards = [
        shard
        for split, samples in source.splits.items()
        for shard in write_shards(folder, samples, split, samples_per_shard)
    ]
    manifest = plan.model_copy(update={"shards": tuple(shards)})
    write_manifest(folder, manifest)
    return manifest


def _must_not_hold_other_data(folder: Folder, plan: Manifest) -> None:
    names = folder.names()
    other = PLAN_NAME in names
    if MANIFEST_NAME in names and not other:
        try:
            found = Manifest.model_validate_json(folder.read_bytes(MANIFEST_NAME))
            other = found.model_copy(update={"shards": ()}) != plan
        except ValueError:  # damaged, or of another format
            other = True
    if other:
        raise ConfigError(f"{folder.url} holds other data already; fix: give another --out")


def digits() -> Source:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 grey: 1,500 to train, 297 to test."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the digits data set needs scikit-learn, which is not installed; "
            "fix: pip install dtr-scale[prepare]"
        ) from error
    images, labels = load_digits(return_X_y=True)
    samples = [
        StoredSample(image.reshape(1, 8, 8).astype(np.uint8), int(label))
        for image, label in zip(images, labels, strict=True)
    ]
    return Source(
        encoding="pixels",
        shape=(1, 8, 8),
        dtype="uint8",
        scale_factor=1 / 8,  # stored 0..16
        shift=-1.0,
        class_names=tuple("0123456789"),
        splits={"train": samples[:1500], "val": samples[1500:]},
    )


def prepare_digits(folder: Folder) -> Manifest:
    """Write the digits as shards of 500 samples and return their manifest."""
    return prepare(digits(), folder, samples_per_shard=500)


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
