"""Read and write sets of pictures, uint8, batch by batch: of any size, never all in memory."""

import contextlib
import hashlib
import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dtr_scale.errors import EvaluationError

ARRAY, LABELS = "arr_0", "arr_1"
"""numpy's names of what is given to `savez` without any, and so ADM's."""
ROUNDING = "127.5 x + 128, cut off"  # what manifests tell of `to_uint8`


def to_uint8(images: Tensor) -> Tensor:
    """Return the levels 0 to 255 that a picture shows of images in [-1, 1].

    127.5 x + 128, clamped and cut off, as DiT's sample_ddp.py: this rounds to the nearest level.
    (x + 1) / 2 * 255 cut off, as ADM's image_sample.py, is half a level darker, which FID sees.
    """
    return (127.5 * images + 128.0).clamp(0, 255).to(torch.uint8)


class Pictures(ABC):
    """A set of pictures of one size, from a `source`, of `shape` [C, H, W]."""

    source: str
    shape: tuple[int, int, int]

    @cached_property
    def sha256(self) -> str:
        """Hash of their content, by which what was computed of them is found again."""
        return self._hash()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """Yield all of them in their order, uint8 [n, C, H, W]."""

    def share(self, batch_size: int, first: int, every: int) -> Iterator[np.ndarray]:
        """Yield of those batches number `first` and every `every`-th after it."""
        return islice(self.batches(batch_size), first, None, every)

    @abstractmethod
    def _hash(self) -> str: ...


class ArrayPictures(Pictures):
    """Pictures in memory, uint8 [N, C, H, W]."""

    def __init__(self, images: np.ndarray, source: str) -> None:
        self._images = images
        self.source = source
        self.shape = images.shape[1:]

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{self._images.shape}".encode())
        digest.update(np.ascontiguousarray(self._images).data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(self), batch_size):
            yield self._images[start : start + batch_size]


class NpzPictures(Pictures):
    """`arr_0` of an .npz, uint8 [N, H, W, C], as ADM and DiT write samples and references.

    It is read as it goes: 50,000 samples of 256x256 have 9.8 GB. Raises EvaluationError for another
    file.
    """

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self._path = path
        with self._opened() as (_, shape):
            self._count = shape[0]
            self.shape = (shape[3], shape[1], shape[2])

    def _hash(self) -> str:
        return file_sha256(self._path)

    def __len__(self) -> int:
        return self._count

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        channels, height, width = self.shape
        picture_bytes = channels * height * width
        with self._opened() as (file, _):
            for start in range(0, self._count, batch_size):
                count = min(batch_size, self._count - start)
                content = file.read(count * picture_bytes)
                if len(content) != count * picture_bytes:
                    raise EvaluationError(f"{self._path}: {ARRAY} is cut; write the file again")
                pictures = np.frombuffer(content, np.uint8).reshape(count, height, width, channels)
                yield pictures.transpose(0, 3, 1, 2)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
        """Open the array behind its header; yield it with its shape."""
        accepted = f"accepted: an .npz with {ARRAY}, uint8 [N, H, W, 1 or 3]"
        try:
            with (
                zipfile.ZipFile(self._path) as archive,
                archive.open(f"{ARRAY}.npy") as file,
            ):
                # numpy writes version 1.0 for every header of a plain array.
                np.lib.format.read_magic(file)
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
                plain = dtype == np.uint8 and not fortran_order
                if not plain or len(shape) != 4 or shape[3] not in (1, 3) or not shape[0]:
                    raise EvaluationError(
                        f"{self._path}: {ARRAY} is {dtype} {list(shape)}; {accepted}"
                    )
                yield file, shape
        except KeyError:
            raise EvaluationError(f"{self._path} has no {ARRAY}; {accepted}") from None
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise EvaluationError(f"{self._path} cannot be read ({error}); {accepted}") from error


def file_sha256(path: Path) -> str:
    """Return the hash of a file, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_npz(
    file: BinaryIO,
    batches: Iterable[np.ndarray],
    shape: tuple[int, ...],
    dtype: str,
    labels: np.ndarray | None,
    *,
    name: str = ARRAY,
) -> None:
    """Write batches [n, ...] as one array of `shape`, and labels int64 [N] beside it.

    The bytes are those of `np.savez(file, all_batches, labels)`.
    """
    with zipfile.ZipFile(file, "w") as archive:  # stored, not compressed: readers can seek
        with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)  # pyright: ignore
            for batch in batches:
                member.write(np.ascontiguousarray(batch, dtype).data)
        if labels is not None:
            with archive.open(f"{LABELS}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, labels, allow_pickle=False)


def rgb(pictures: np.ndarray) -> np.ndarray:
    """Return uint8 [n, H, W, 3] of pictures with one channel or three."""
    return pictures if pictures.shape[3] == 3 else pictures.repeat(3, axis=3)


def write_pngs(folder: Path, batches: Iterable[np.ndarray]) -> None:
    """Write pictures uint8 [n, H, W, C] as 000000.png, 000001.png, ... in a folder."""
    from PIL import Image

    def write(number: int, picture: np.ndarray) -> None:
        Image.fromarray(picture.squeeze(-1) if picture.shape[2] == 1 else picture).save(
            folder / f"{number:06d}.png"
        )

    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    # Pillow compresses outside of the GIL.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for batch in batches:
            numbers = range(first, first + len(batch))
            list(threads.map(write, numbers, batch))
            first += len(batch)
