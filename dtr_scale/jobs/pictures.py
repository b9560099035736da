"""Open whatever holds pictures to be measured: an .npz, a folder, shards, the samples of a run."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from dtr_scale.data.manifest import MANIFEST_NAME, data_errors, read_manifest
from dtr_scale.data.reader import SampleReader, Samples
from dtr_scale.errors import ConfigError, EvaluationError
from dtr_scale.evaluation.pictures import NpzPictures, Pictures, file_sha256, to_uint8
from dtr_scale.prepare.encode import PictureEncoder, decoder_of
from dtr_scale.prepare.images import (
    UnreadablePictureError,
    picture_size,
    read_ahead,
    read_picture,
)
from dtr_scale.prepare.listing import one_class
from dtr_scale.storage.folder import open_folder


def open_pictures(
    source: str, *, size: int | None, split: str, vae: str | None, device: torch.device
) -> Pictures:
    """Return the pictures of an .npz, of a folder, or of prepared shards, which are decoded.

    `size` is for a folder: each picture's centre, cropped as ADM does; None: as they are. `split`
    and `vae` are for shards.
    """
    folder = open_folder(source)
    with data_errors(folder, MANIFEST_NAME):
        prepared = not source.endswith(".npz") and folder.exists(MANIFEST_NAME)
    if prepared:
        manifest = read_manifest(folder, split)
        decoder = decoder_of(manifest, vae, device)
        found = ShardPictures(SampleReader(folder, manifest, split), split, decoder, source)
    elif source.endswith(".npz"):
        found = NpzPictures(Path(source))
    elif folder.is_local:
        return FolderPictures(Path(source), size)
    else:
        raise ConfigError(f"{source} has no {MANIFEST_NAME}; give prepared data or a local folder")
    if size not in (None, found.shape[1]):
        raise ConfigError(
            f"--size={size} is for a folder of pictures; {source} has {list(found.shape)}"
        )
    return found


class FolderPictures(Pictures):
    """All pictures below a folder in the order of their names, as RGB."""

    def __init__(self, root: Path, size: int | None) -> None:
        self.source = str(root)
        (self._pictures,) = one_class(root, source=f"folder {root}").splits.values()
        self._crops = size is not None
        self._size = size or self._first_width()
        self.shape = (3, self._size, self._size)
        self._cores = len(os.sched_getaffinity(0))

    def __len__(self) -> int:
        return len(self._pictures)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        paths = [picture.path for picture in self._pictures]
        asked = (paths[i : i + batch_size] for i in range(0, len(paths), batch_size))
        for batch in read_ahead(asked, self._read, num_workers=self._cores):
            yield np.stack(batch)

    def _first_width(self) -> int:
        path = self._pictures[0].path
        try:
            return picture_size(path)[0]
        except UnreadablePictureError as error:
            raise EvaluationError(f"{path} is no picture ({error}); remove it") from error

    def _read(self, path: str) -> np.ndarray:
        try:
            if not self._crops and (found := picture_size(path)) != (self._size, self._size):
                # Samples are measured as they are: scaled, they would be other pictures.
                raise EvaluationError(
                    f"{path} is {found[0]}x{found[1]}, not {self._size}x{self._size}; give square "
                    "pictures of one size, or --size to crop and scale a reference's"
                )
            return read_picture(path, self._size)
        except UnreadablePictureError as error:
            raise EvaluationError(f"{path} is no picture ({error}); remove it") from error

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{self.shape}".encode())
        for picture in self._pictures:
            digest.update(file_sha256(Path(picture.path)).encode())
        return digest.hexdigest()


class ShardPictures(Pictures):
    """The pictures of a split of prepared data: pixels as they are, latents decoded."""

    def __init__(self, samples: Samples, split: str, decoder: PictureEncoder, source: str) -> None:
        by = f", decoded by {decoder.record.name}" if decoder.record else ""
        self.source = f"{source}, split {split}{by}"
        self._samples = samples
        self._split = split
        self._decoder = decoder
        self._places = [
            (shard, i) for shard, size in enumerate(samples.shard_samples) for i in range(size)
        ]
        self.shape = next(self.batches(1)).shape[1:]

    def __len__(self) -> int:
        return len(self._places)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        return self.share(batch_size, first=0, every=1)

    def share(self, batch_size: int, first: int, every: int) -> Iterator[np.ndarray]:
        decode = self._samples.manifest.decode
        try:
            # What others take is neither read nor decoded.
            for start in range(first * batch_size, len(self), every * batch_size):
                places = self._places[start : start + batch_size]
                x_start = np.stack([decode(self._samples.read(*place)[0]) for place in places])
                yield to_uint8(self._decoder.decode(torch.from_numpy(x_start))).numpy()
        finally:
            self._samples.close()

    def _hash(self) -> str:
        told = [self._samples.manifest.hash(self._split), decoder_sha256(self._decoder)]
        return hashlib.sha256(f"{told}".encode()).hexdigest()


def decoder_sha256(decoder: PictureEncoder) -> str | None:
    """Return the hash of a decoder's weights; None for pixels, which need none."""
    return None if decoder.record is None else decoder.record.sha256
