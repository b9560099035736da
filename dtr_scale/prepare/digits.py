"""Write arrays that are in memory, such as scikit-learn's digits, as shards with a manifest."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dtr_scale.data.manifest import MANIFEST_NAME, Manifest, write_manifest
from dtr_scale.errors import ConfigError
from dtr_scale.prepare.ledger import PLAN_NAME
from dtr_scale.prepare.writer import StoredSample, write_shards
from dtr_scale.storage.folder import Folder


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
