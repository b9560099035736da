"""List the pictures of IDX files, the format of MNIST and its relatives, such as Fashion-MNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np

from dtr_scale.data.manifest import one_line
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.prepare.listing import Listing, Picture

_SPLITS = {"train": "train", "val": "t10k"}  # as their files are named
_UINT8 = 0x08


def idx_folder(root: Path, size: int | None = None) -> Listing:
    """List the grey pictures of a folder with train-images-idx3-ubyte[.gz] and its fellows.

    The ten thousand of `t10k` become the split val. A `size` above that of the pictures puts them
    into the middle of black ones, since scaling would blur what is small anyway.
    """
    splits: dict[str, list[Picture]] = {}
    for split, prefix in _SPLITS.items():
        images = _read(root, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read(root, f"{prefix}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise DataError(
                f"{root}: {prefix} has {len(images)} pictures and {len(labels)} labels; "
                "fetch the files again"
            )
        pixels = _padded(images, size, root)[:, None]
        splits[split] = [
            Picture(f"{prefix}/{i:05d}", label=int(label), array=picture)
            for i, (picture, label) in enumerate(zip(pixels, labels, strict=True))
        ]
    num_classes = 1 + max(picture.label for pictures in splits.values() for picture in pictures)
    return Listing("idx", splits, num_classes, tuple(map(str, range(num_classes))))


def picture_size(listing: Listing) -> int:
    """Return the height and width of the pictures of such a listing."""
    array = listing.splits["train"][0].array
    assert array is not None
    return array.shape[-1]


def _padded(images: np.ndarray, size: int | None, root: Path) -> np.ndarray:
    """Return pictures [N, size, size] with those [N, H, W] in their middle."""
    side = max(images.shape[1:])
    if size is not None and size < side:
        raise ConfigError(
            f"--size={size} is less than the {side} pixels of {root}; give {side} or more"
        )
    margins = [((size or side) - length) for length in images.shape[1:]]
    return np.pad(images, [(0, 0), *((m // 2, m - m // 2) for m in margins)])


def _read(root: Path, name: str, num_axes: int) -> np.ndarray:
    """Return the uint8 array of an IDX file, gzipped or not."""
    path = next((p for p in (root / name, root / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise DataError(
            f"{root} has no {name} or {name}.gz; give a folder of MNIST's files, for example "
            "/usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist"
        )
    try:
        content = path.read_bytes()
        data = gzip.decompress(content) if path.suffix == ".gz" else content
        zero, kind, axes, *shape = struct.unpack_from(f">HBB{num_axes}I", data)
        if (zero, kind, axes) != (0, _UINT8, num_axes):
            raise ValueError(f"its header says type {kind:#04x} with {axes} axes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * num_axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        raise DataError(
            f"{path} is no IDX file of bytes with {num_axes} axes ({one_line(error)}); "
            "fetch it again"
        ) from error
