"""One split of a prepared folder, held against its manifest."""

import hashlib
import io
import os
from io import FileIO

import numpy as np

from dtr_scale.data.cache import ShardCache, closed_on_error
from dtr_scale.data.manifest import NULL_CONTEXT_NAME, Manifest, data_errors
from dtr_scale.data.prefetch import OpenShard
from dtr_scale.errors import DataError


class Split:
    """Opens the shards of a split; what is not as the manifest says raises a DataError."""

    def __init__(self, manifest: Manifest, cache: ShardCache) -> None:
        self.manifest = manifest
        self.cache = cache

    def check_sizes(self) -> None:
        """Look at every shard's size before training: DataError for one missing or cut short."""
        folder = self.cache.folder
        with data_errors(folder, "the list of shards"):
            sizes = folder.sizes()
        for shard in self.cache.shards:
            for name in (shard.name, shard.index_name):
                with data_errors(folder, f"shard {name}"):
                    if name not in sizes:
                        raise FileNotFoundError(f"not among the {len(sizes)} files there")
            if sizes[shard.name] != shard.bytes:
                raise self.cache.mismatch(shard.name, f"bytes {shard.bytes}", sizes[shard.name])

    def null_condition(self) -> np.ndarray:
        """Return the empty caption's tokens, zeros where the data has none, float32 [L, D]."""
        shape, expected = self.manifest.context_shape, self.manifest.null_context_sha256
        assert shape is not None
        if expected is None:
            return np.zeros(shape, np.float32)
        with data_errors(self.cache.folder, NULL_CONTEXT_NAME):
            content = self.cache.folder.read_bytes(NULL_CONTEXT_NAME)
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            raise self.cache.mismatch(NULL_CONTEXT_NAME, f"sha256 {expected}", found)
        return np.load(io.BytesIO(content)).reshape(shape).astype(np.float32)

    def open(self, shard: int, wait: bool = True) -> OpenShard:
        """Return a shard, verified; for `wait` see `ShardCache.open`."""
        rows = self.rows(shard)
        with closed_on_error(self.cache.open(shard, wait=wait)) as file:
            if len(rows):
                self._check_header(shard, file, int(rows[0, 0]))
        return OpenShard(file, rows)

    def rows(self, shard: int) -> np.ndarray:
        """Return where a shard's samples lie, int64 [samples, 4], checked against the manifest."""
        described, manifest = self.cache.shards[shard], self.manifest
        rows = np.load(io.BytesIO(self.cache.index(shard)))
        if len(rows) != described.samples:
            raise self.error(shard, f"{described.samples} samples", f"{len(rows)}")
        labels, captions = rows[:, 1], rows[:, 3]
        if not np.all((labels >= 0) & (labels < manifest.num_classes)):
            raise self.error(shard, f"{manifest.num_classes} classes", f"class {labels.max()}")
        if manifest.context_shape is not None and not np.all(captions):
            raise self.error(shard, "captions", f"sample {captions.argmin()} without one")
        return rows

    def _check_header(self, shard: int, file: FileIO, offset: int) -> None:
        """Look at the shape and dtype before the first sample's numbers."""
        before = os.pread(file.fileno(), min(offset, 512), max(0, offset - 512))
        header = io.BytesIO(before[before.rfind(b"\x93NUMPY") :])
        np.lib.format.read_magic(header)
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
        manifest = self.manifest
        if (shape, dtype) != (manifest.stored_shape, np.dtype(manifest.dtype)):
            expected = f"arrays {manifest.dtype} {manifest.stored_shape}"
            raise self.error(shard, expected, f"{dtype} {shape}")

    def error(self, shard: int, expected: str, found: str) -> DataError:
        """Return the error of a shard that is not what the manifest says."""
        return self.cache.mismatch(self.cache.shards[shard].name, expected, found)
