"""Keep shards of object storage on a local disk, for all processes and jobs of a node.

A shard is fetched whole, once per node, into a bounded folder under a name made of its hash, so
that jobs may share the folder.
"""

import contextlib
import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

import numpy as np

from dtr_scale.data.eviction import CacheFolder
from dtr_scale.data.manifest import Shard
from dtr_scale.data.seals import (
    FolderSeals,
    ProcessSeals,
    Seal,
    Seals,
    make_private,
    open_copy,
    own_folder,
)
from dtr_scale.data.shards import (
    FileShard,
    LocalShards,
    MemoryShards,
    RangedShard,
    Shards,
    closed_on_error,
)
from dtr_scale.data.split import Split
from dtr_scale.errors import DataError
from dtr_scale.storage.folder import open_folder

log = logging.getLogger(__name__)

GIB = 2**30
_ATTEMPTS = 10


def default_cache_dir() -> Path:
    """Return this user's folder for shards, in XDG_CACHE_HOME or ~/.cache."""
    place = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(place).expanduser() / "dtr_scale" / "shards"


def choose_shards(split: Split, cache_dir: Path | None, max_bytes: int) -> Shards:
    """Return the way to a split's shards; a cache of 0 bytes means that no local disk is used."""
    path = own_folder(cache_dir or default_cache_dir())
    if split.folder.is_local:
        return LocalShards(split, _seals_of_local_shards(path, cache_dir is not None, max_bytes))
    return CachedShards(split, CacheFolder(path, max_bytes)) if max_bytes else MemoryShards(split)


def _seals_of_local_shards(path: Path, asked_for: bool, max_bytes: int) -> Seals:
    """Return seals in the cache, or in memory: there is no copy to keep, so a cache is no must."""
    if not max_bytes:
        return ProcessSeals()
    try:
        make_private(path)
    except DataError as error:
        if asked_for:
            raise
        log.info("each process hashes the shards by itself: %s", error)
        return ProcessSeals()
    return FolderSeals(path)


class CachedShards(Shards):
    """Shards of object storage as files in a folder of bounded size (see `CacheFolder`)."""

    def __init__(self, split: Split, files: CacheFolder) -> None:
        self.split = split
        self.files = files
        self._seals = FolderSeals(files.path)
        self._next_uses: Callable[[], Iterable[int]] = tuple
        files.next_uses = self._hashes_by_next_use
        largest = max(split.shards, key=lambda shard: shard.bytes)
        # A shard that can never fit would be evicted as often as it is fetched.
        if files.max_bytes < largest.bytes:
            raise DataError(
                f"shard {largest.name} of {split.folder.url} has {largest.bytes} bytes, the cache "
                f"{files.path} may hold {files.max_bytes}; fix: raise data.cache_gb"
            )

    def open(self, i: int, wait: bool = True) -> FileShard:
        """Return a shard's file, fetched and hashed if need be; it outlives its eviction."""
        rows, shard = self._rows(i), self.split.shards[i]
        # The seal's lock covers fetching as well as hashing: one process of a node does either.
        with self._seals.hold(shard.sha256, wait) as seal:
            try:
                file = self._open_or_fetch(i, seal)
            except OSError as error:
                raise self._cannot_keep(shard, error) from error
        with closed_on_error(file):
            return FileShard(self.split, i, file, rows)

    def ranged(self, i: int) -> RangedShard | None:
        """Return what reads single samples, unless the cache has the shard."""
        # A look without the lock: where the copy goes meanwhile, `open` fetches it again.
        if self._path(self.split.shards[i]).exists():
            return None
        return RangedShard(self.split, i, self._rows(i))

    def expect(self, next_uses: Callable[[], Iterable[int]]) -> None:
        """Evict the shards that will be needed last first."""
        self._next_uses = next_uses

    def _hashes_by_next_use(self) -> list[str]:
        return [self.split.shards[i].sha256 for i in self._next_uses()]

    def _rows(self, i: int) -> np.ndarray:
        """Return a shard's rows by the copy of its index, which is made if there is none."""
        shard = self.split.shards[i]
        copy = self._path(shard).with_suffix(".index.npy")
        # Before anything there is read: another user could have put it there.
        make_private(self.files.path)
        with contextlib.suppress(OSError):
            # Hashed at each opening, without a seal: a sample has 32 bytes in it.
            content = copy.read_bytes()
            if hashlib.sha256(content).hexdigest() == shard.index_sha256:
                return self.split.rows(i, content)
        content = self.split.read_index(i)
        with contextlib.suppress(OSError):  # a copy of so little is a convenience
            open_folder(copy.parent).write_bytes(copy.name, content)
        return self.split.rows(i, content)

    def _path(self, shard: Shard) -> Path:
        return self.files.path / f"{shard.sha256}.tar"

    def _open_or_fetch(self, i: int, seal: Seal) -> FileIO:
        # A copy that was altered on this disk is fetched once more.
        with contextlib.suppress(FileNotFoundError, DataError):
            return self._open_copy(i, seal)
        for _ in range(_ATTEMPTS):
            self._fetch(i)
            try:
                file = self._open_copy(i, seal)
            except FileNotFoundError:
                continue  # another process has evicted it at once
            except DataError:
                # What has just come differs from the manifest: the storage itself is wrong.
                self._path(self.split.shards[i]).unlink(missing_ok=True)
                raise
            self.files.make_room(0)  # for what came at the same time
            return file
        raise OSError(f"evicted {_ATTEMPTS} times as soon as it was there: the cache is too small")

    def _open_copy(self, i: int, seal: Seal) -> FileIO:
        with closed_on_error(open_copy(self._path(self.split.shards[i]))) as file:
            self.split.verify(i, file, seal)
            self.files.use(file)
            return file

    def _fetch(self, i: int) -> None:
        """Fetch a shard; where the disk is full, after others were evicted."""
        shard = self.split.shards[i]
        path = self._path(shard)
        # Nobody else writes these: this process holds the shard's seal.
        for left_over in path.parent.glob(f".{path.name}.*"):  # of a killed process
            left_over.unlink(missing_ok=True)
        self.files.make_room(shard.bytes)
        while True:
            with self.split.reading(i):
                try:
                    return self.split.folder.get(shard.name, path)
                except OSError as error:
                    # Others fill this disk, too: it may be full before the cache has its own bytes.
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    full = error
            if not self.files.evict(shard.bytes):
                raise self._cannot_keep(shard, full) from full

    def _cannot_keep(self, shard: Shard, error: OSError) -> DataError:
        return DataError(
            f"cannot keep shard {shard.name} in the cache {self.files.path} ({error}); fix: set "
            "data.cache_dir to a disk with room, or lower data.cache_gb (0: none is used)"
        )
