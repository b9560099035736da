"""Verified local copies of shards, shared by the processes of a node.

A shard in a local folder is used where it lies. A shard in object storage is fetched whole, once
per node, into a bounded folder under a name made of its hash, so jobs may share that folder.
"""

import contextlib
import errno
import fcntl
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from dtr_scale.data.manifest import Shard, data_errors
from dtr_scale.data.shards import file_sha256
from dtr_scale.errors import DataError, DtrScaleError
from dtr_scale.storage import Folder

GIB = 2**30


def default_cache_dir() -> Path:
    """Return this user's folder for shards in the system's folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"dtr_scale-{os.getuid()}" / "shards"


class ShardCache:
    """Opens the shards of a split as local files whose size and sha256 are the manifest's.

    `max_bytes` bounds what `cache_dir` holds, besides downloads under way and files still open;
    the shard used longest ago goes first. Each process hashes a shard once, when it first opens
    it: a copy that rotted on the local disk is fetched again.
    """

    def __init__(
        self,
        folder: Folder,
        shards: Sequence[Shard],
        cache_dir: Path | None = None,
        max_bytes: int = 64 * GIB,
    ) -> None:
        self.folder = folder
        self.shards = tuple(shards)
        self.cache_dir = cache_dir or default_cache_dir()
        self.max_bytes = max_bytes
        self._verified: set[int] = set()
        largest = max(self.shards, key=lambda shard: shard.bytes)
        if not folder.is_local and largest.bytes > max_bytes:
            raise DataError(
                f"shard {largest.name} of {folder.url} has {largest.bytes} bytes, the cache "
                f"{self.cache_dir} may hold {max_bytes}; fix: raise data.cache_gb"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_verified": set()}  # another process checks for itself

    def open(self, shard_id: int) -> FileIO:
        """Return a shard's verified file, open for reading; it stays readable when evicted.

        DataError names the shard, what the manifest says and what was found.
        """
        shard = self.shards[shard_id]
        if self.folder.is_local:
            path = self.folder.local_path / shard.name
            with data_errors(self.folder, _described(shard)):
                self._verify_once(shard_id, path)
                return FileIO(path)
        try:
            return self._open_cached(shard_id)
        except OSError as error:
            raise self._no_room(shard, error) from error

    def prefetch(self, shard_ids: Iterable[int]) -> None:
        """Fetch and verify shards in the background; errors wait for whoever opens the shard."""

        def fetch() -> None:
            for shard_id in shard_ids:
                with contextlib.suppress(DtrScaleError, OSError):
                    self.open(shard_id).close()

        threading.Thread(target=fetch, name="shard-prefetch", daemon=True).start()

    def _open_cached(self, shard_id: int) -> FileIO:
        shard = self.shards[shard_id]
        path = self.cache_dir / f"{shard.sha256}.tar"
        self.cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(path.with_suffix(".lock")):
            try:
                self._verify_once(shard_id, path)
            except (FileNotFoundError, DataError):
                self._verified.discard(shard_id)
                self._make_room(shard.bytes)
                self._fetch(shard, path)
                try:
                    self._verify_once(shard_id, path)
                except DataError:
                    path.unlink()
                    raise
            os.utime(path)
            return FileIO(path)

    def _fetch(self, shard: Shard, path: Path) -> None:
        with data_errors(self.folder, _described(shard)):
            try:
                self.folder.get(shard.name, path)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise self._no_room(shard, error) from error
                raise

    def _verify_once(self, shard_id: int, path: Path) -> None:
        shard = self.shards[shard_id]
        found_bytes = path.stat().st_size
        if found_bytes != shard.bytes:
            raise self._mismatch(shard, "bytes", shard.bytes, found_bytes)
        if shard_id not in self._verified:
            found_sha256 = file_sha256(path)
            if found_sha256 != shard.sha256:
                raise self._mismatch(shard, "sha256", shard.sha256, found_sha256)
            self._verified.add(shard_id)

    def _mismatch(self, shard: Shard, what: str, expected: object, found: object) -> DataError:
        return DataError(
            f"shard {shard.name} in {self.folder.url}: the manifest says {what} {expected}, found "
            f"{found}; fix: store the shard again, or prepare the data again (dtr-scale prepare)"
        )

    def _no_room(self, shard: Shard, error: OSError) -> DataError:
        return DataError(
            f"cannot keep shard {shard.name} in the cache {self.cache_dir} ({error}); fix: set "
            "data.cache_dir to a disk with room, or lower data.cache_gb"
        )

    def _make_room(self, num_bytes: int) -> None:
        """Delete what was used longest ago until `num_bytes` more fit."""
        with _locked(self.cache_dir / "evict.lock"):
            files = [(path, path.stat()) for path in self.cache_dir.glob("*.tar")]
            total = num_bytes + sum(stat.st_size for _, stat in files)
            for path, stat in sorted(files, key=lambda file: file[1].st_mtime_ns):
                if total <= self.max_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= stat.st_size


def _described(shard: Shard) -> str:
    return f"shard {shard.name} ({shard.samples} samples, {shard.bytes} bytes in the manifest)"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among threads and processes; the kernel drops it when the holder dies."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
