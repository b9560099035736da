"""Prepare scikit-learn's handwritten digits, which need no download and no network."""

import numpy as np

from dtr_scale.data.manifest import Manifest
from dtr_scale.errors import ConfigError
from dtr_scale.prepare.encode import PixelEncoder
from dtr_scale.prepare.listing import Listing, Picture
from dtr_scale.prepare.preparation import Preparation
from dtr_scale.storage.folder import Folder

_SHARD_BYTES = 500 * 2048  # 500 samples of a header and a block for each of array and class
ENCODER = PixelEncoder(8, channels=1, scale_factor=1 / 8)  # stored 0..16


def digits() -> Listing:
    """List scikit-learn's 1,797 digits, 8x8 grey: 1,500 to train, 297 to test."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            "the digits data set needs scikit-learn, which is not installed; "
            "fix: pip install dtr-scale[prepare]"
        ) from error
    images, labels = load_digits(return_X_y=True)
    pictures = [
        Picture(str(i), label=int(label), array=image.reshape(1, 8, 8).astype(np.uint8))
        for i, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    splits = {"train": pictures[:1500], "val": pictures[1500:]}
    return Listing("digits", splits, 10, tuple("0123456789"), shuffled=False)


def prepare_digits(folder: Folder) -> Manifest:
    """Write the digits as shards of 500 samples and return their manifest."""
    manifest = Preparation(digits(), folder, ENCODER, shard_bytes=_SHARD_BYTES).run().manifest
    assert manifest is not None, "one rank alone makes all shards"
    return manifest
