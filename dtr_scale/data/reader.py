"""Reading single samples of prepared shards."""

import io
import os
import tarfile
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dtr_scale.data.cache import GIB, ShardCache
from dtr_scale.data.manifest import Manifest, data_errors
from dtr_scale.errors import DataError
from dtr_scale.storage import Folder

Condition = int | np.ndarray
"""A class index, or a text's tokens float [L, D]."""

Sample = tuple[np.ndarray, Condition]
"""Stored array and condition."""


class Samples(Protocol):
    """Samples of one split by (shard, index): `SampleReader`, `SyntheticSource`."""

    manifest: Manifest
    shard_samples: tuple[int, ...]

    def read(self, shard: int, index: int) -> Sample:
        """Return the stored array and the condition of a sample."""
        ...

    def prefetch(self, shards: tuple[int, ...]) -> None:
        """Start fetching shards that will be read soon."""
        ...

    def close(self) -> None:
        """Close the files; they are opened again when needed."""
        ...


class _OpenShard(NamedTuple):
    file: FileIO
    offsets: np.ndarray  # int64 [samples], where each array's numbers start
    labels: np.ndarray  # int64 [samples]


class SampleReader:
    """The samples of one split of a prepared folder, by (shard, index in the shard).

    Keeps the shards of two windows open; their tar headers are parsed once, then a sample is one
    read at a known offset. A shard that is not what the manifest says raises a DataError.
    """

    def __init__(
        self,
        folder: Folder,
        manifest: Manifest,
        split: str = "train",
        *,
        window_shards: int = 8,
        cache_dir: Path | None = None,
        cache_max_bytes: int = 64 * GIB,
    ) -> None:
        self.manifest = manifest
        shards = manifest.split(split)
        self.shard_samples = tuple(shard.samples for shard in shards)
        self.cache = ShardCache(folder, shards, cache_dir, cache_max_bytes)
        self._max_open = 2 * window_shards
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._dtype = np.dtype(manifest.dtype)
        self._sample_bytes = self._dtype.itemsize * int(np.prod(manifest.stored_shape))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # files do not cross processes

    def read(self, shard: int, index: int) -> Sample:
        """Return (stored array, class index) of a sample."""
        opened = self._opened(shard)
        offset = int(opened.offsets[index])
        content = os.pread(opened.file.fileno(), self._sample_bytes, offset)
        if len(content) != self._sample_bytes:
            raise self._error(
                shard, f"{self._sample_bytes} bytes at {offset}", f"{len(content)}: it was cut"
            )
        array = np.frombuffer(content, self._dtype).reshape(self.manifest.stored_shape)
        return array, int(opened.labels[index])

    def check_sizes(self) -> None:
        """Look at every shard's size before training: DataError for one missing or cut short."""
        folder = self.cache.folder
        for shard_id, shard in enumerate(self.cache.shards):
            with data_errors(folder, f"shard {shard.name}"):
                size = folder.size(shard.name)
            if size != shard.bytes:
                raise self._error(shard_id, f"{shard.bytes} bytes", f"{size}")

    def prefetch(self, shards: tuple[int, ...]) -> None:
        """Fetch and verify shards in the background."""
        self.cache.prefetch([shard for shard in shards if shard not in self._open])

    def close(self) -> None:
        """Close the shards; they are opened again when needed."""
        while self._open:
            self._close_oldest()

    def _opened(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        while len(self._open) >= self._max_open:
            self._close_oldest()
        file = self.cache.open(shard)
        try:
            self._open[shard] = self._index(shard, file)
        except BaseException:
            file.close()
            raise
        return self._open[shard]

    def _close_oldest(self) -> None:
        self._open.popitem(last=False)[1].file.close()

    def _index(self, shard: int, file: FileIO) -> _OpenShard:
        """Parse the tar's headers, once; check what it holds against the manifest."""
        arrays: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition(".")
                if kind == "npy":
                    arrays[key] = member
                elif kind == "cls":
                    labels[key] = int(os.pread(file.fileno(), member.size, member.offset_data))
        expected = self.cache.shards[shard].samples
        if arrays.keys() != labels.keys() or len(arrays) != expected:
            found = f"{len(arrays)} arrays and {len(labels)} labels"
            raise self._error(shard, f"{expected} samples", found)
        header_bytes = self._check_header(shard, file, next(iter(arrays.values())))
        for key, member in arrays.items():
            if member.size != header_bytes + self._sample_bytes:
                found = f"{member.size} in {key}.npy"
                raise self._error(shard, f"{header_bytes + self._sample_bytes} bytes", found)
            if not 0 <= labels[key] < self.manifest.num_classes:
                found = f"class {labels[key]} in {key}.cls"
                raise self._error(shard, f"{self.manifest.num_classes} classes", found)
        offsets = [member.offset_data + header_bytes for member in arrays.values()]
        return _OpenShard(file, np.array(offsets), np.array([labels[key] for key in arrays]))

    def _check_header(self, shard: int, file: FileIO, member: tarfile.TarInfo) -> int:
        """Return the length of the .npy header, after a look at its shape and dtype."""
        content = io.BytesIO(os.pread(file.fileno(), member.size, member.offset_data))
        np.lib.format.read_magic(content)
        shape, _, dtype = np.lib.format.read_array_header_1_0(content)
        if (shape, dtype) != (self.manifest.stored_shape, self._dtype):
            expected = f"arrays {self._dtype} {self.manifest.stored_shape}"
            raise self._error(shard, expected, f"{dtype} {shape}")
        return content.tell()

    def _error(self, shard: int, expected: str, found: str) -> DataError:
        return DataError(
            f"shard {self.cache.shards[shard].name} in {self.cache.folder.url}: the manifest says "
            f"{expected}, found {found}; fix: prepare the data again (dtr-scale prepare)"
        )
