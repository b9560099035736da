"""Check the files of a split against its manifest, and name the one that differs."""

import hashlib
import io
import os
from contextlib import AbstractContextManager
from io import FileIO

import numpy as np

from dtr_scale.data.manifest import NULL_CONTEXT_NAME, Manifest, data_errors
from dtr_scale.data.seals import Seal
from dtr_scale.errors import DataError
from dtr_scale.storage.folder import Folder


class Split:
    """The shards of a split as the manifest describes them; what differs raises a DataError."""

    def __init__(self, folder: Folder, manifest: Manifest, name: str = "train") -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards = manifest.split(name)

    def check_sizes(self) -> None:
        """Look at every shard's size before training: DataError for one missing or cut short."""
        with data_errors(self.folder, "the list of shards"):
            # One listing instead of two requests per shard.
            sizes = self.folder.sizes()
        for shard in self.shards:
            for name in (shard.name, shard.index_name):
                with data_errors(self.folder, f"shard {name}"):
                    if name not in sizes:
                        raise FileNotFoundError(f"not among the {len(sizes)} files there")
            if sizes[shard.name] != shard.bytes:
                raise self.mismatch(shard.name, f"bytes {shard.bytes}", sizes[shard.name])

    def null_condition(self) -> np.ndarray:
        """Return the empty caption's tokens, zeros where the data has none, float32 [L, D]."""
        shape, expected = self.manifest.context_shape, self.manifest.null_context_sha256
        assert shape is not None
        if expected is None:
            return np.zeros(shape, np.float32)
        with data_errors(self.folder, NULL_CONTEXT_NAME):
            content = self.folder.read_bytes(NULL_CONTEXT_NAME)
        if (found := hashlib.sha256(content).hexdigest()) != expected:
            raise self.mismatch(NULL_CONTEXT_NAME, f"sha256 {expected}", found)
        try:
            return np.load(io.BytesIO(content)).reshape(shape).astype(np.float32)
        except ValueError as error:  # also of a pickle, which is never loaded
            raise self.mismatch(NULL_CONTEXT_NAME, f"numbers {shape}", error) from None

    def read_index(self, i: int) -> bytes:
        """Return the .npy file that tells where a shard's samples lie, verified."""
        shard = self.shards[i]
        with data_errors(self.folder, shard.index_name):
            content = self.folder.read_bytes(shard.index_name)
        if (found := hashlib.sha256(content).hexdigest()) != shard.index_sha256:
            raise self.mismatch(shard.index_name, f"sha256 {shard.index_sha256}", found)
        return content

    def rows(self, i: int, index: bytes) -> np.ndarray:
        """Return where a shard's samples lie by its index, int64 [samples, 4]."""
        shard, manifest = self.shards[i], self.manifest
        try:
            rows = np.load(io.BytesIO(index))
        except (ValueError, EOFError) as error:  # also of a pickle, which is never loaded
            raise self.mismatch(shard.index_name, "where its samples lie", error) from None
        if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype != np.int64 or np.any(rows < 0):
            found = f"{rows.dtype} {list(rows.shape)}"
            raise self.mismatch(shard.index_name, "places int64 [samples, 4] from 0", found)
        if len(rows) != shard.samples:
            raise self.error(i, f"{shard.samples} samples", f"{len(rows)}")
        labels, captions = rows[:, 1], rows[:, 3]
        if not np.all((labels >= 0) & (labels < manifest.num_classes)):
            raise self.error(i, f"{manifest.num_classes} classes", f"class {labels.max()}")
        if manifest.context_shape is not None and not np.all(captions):
            raise self.error(i, "captions", f"sample {captions.argmin()} without one")
        return rows

    def verify(self, i: int, file: FileIO, seal: Seal) -> None:
        """Compare a file's size and sha256 with the manifest, unless its seal says it was done."""
        if seal.fits(file):
            return
        shard = self.shards[i]
        found_bytes = os.fstat(file.fileno()).st_size
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found_bytes != shard.bytes:
            raise self.mismatch(shard.name, f"bytes {shard.bytes}", found_bytes)
        if found != shard.sha256:
            raise self.mismatch(shard.name, f"sha256 {shard.sha256}", found)
        seal.set(file)

    def check_header(self, i: int, file: FileIO, rows: np.ndarray) -> None:
        """Look at the shape and dtype that stand before the first sample's numbers."""
        if not len(rows):
            return
        offset = int(rows[0, 0])
        # The header of a .npy member ends where its numbers begin.
        before = os.pread(file.fileno(), min(offset, 512), max(0, offset - 512))
        header = io.BytesIO(before[before.rfind(b"\x93NUMPY") :])
        manifest = self.manifest
        try:
            np.lib.format.read_magic(header)
            shape, _, dtype = np.lib.format.read_array_header_1_0(header)
        except ValueError as error:
            raise self.error(i, f"an array at byte {offset}", error) from None
        if (shape, dtype) != (manifest.stored_shape, np.dtype(manifest.dtype)):
            expected = f"arrays {manifest.dtype} {manifest.stored_shape}"
            raise self.error(i, expected, f"{dtype} {shape}")

    def reading(self, i: int) -> AbstractContextManager[None]:
        """Turn what storage raises about a shard into a DataError that names it."""
        shard = self.shards[i]
        described = f"{shard.samples} samples, {shard.bytes} bytes in the manifest"
        return data_errors(self.folder, f"shard {shard.name} ({described})")

    def error(self, i: int, expected: str, found: object) -> DataError:
        """Return the error of a shard that is not what the manifest says."""
        return self.mismatch(self.shards[i].name, expected, found)

    def mismatch(self, name: str, expected: str, found: object) -> DataError:
        """Return the error of a file that is not what the manifest says."""
        return DataError(
            f"shard {name} in {self.folder.url}: the manifest says {expected}, found {found}; "
            "fix: store the shard again, or prepare the data again (dtr-scale prepare)"
        )
