"""Verified shards as files of this machine, shared by the processes of a node.

A shard in a local folder is used where it lies. A shard in object storage is fetched whole, once
per node, into a bounded folder under a name made of its hash, so jobs may share that folder; or,
without a local disk, into this process's memory, as a file without a name.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

from dtr_scale.data.eviction import CacheFolder
from dtr_scale.data.manifest import Shard, data_errors
from dtr_scale.errors import DataError
from dtr_scale.storage.folder import Folder, open_folder

GIB = 2**30
_ATTEMPTS = 10


def default_cache_dir() -> Path:
    """Return this user's folder for shards in the system's folder for temporary files."""
    return Path(tempfile.gettempdir()) / f"dtr_scale-{os.getuid()}" / "shards"


class ShardCache:
    """Opens the shards of a split as local files whose size and sha256 are the manifest's.

    `max_bytes` bounds what `cache_dir` holds (see `CacheFolder` for what goes first), besides
    downloads under way; 0: no local disk is used at all. A file is hashed by the first process
    that opens it, and again when its size, its time or the file itself is another one.
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
        self.files = CacheFolder(cache_dir or default_cache_dir(), max_bytes)
        self._verified: set[Shard] = set()  # without a local disk, where no file can tell
        largest = max(self.shards, key=lambda shard: shard.bytes)
        if not folder.is_local and 0 < max_bytes < largest.bytes:
            raise DataError(
                f"shard {largest.name} of {folder.url} has {largest.bytes} bytes, the cache "
                f"{self.files.path} may hold {max_bytes}; fix: raise data.cache_gb"
            )

    def at_hand(self, shard_id: int) -> bool:
        """Tell whether a shard can be opened without fetching it."""
        on_disk = self.folder.is_local or self.files.max_bytes > 0
        return on_disk and self._path(self.shards[shard_id]).exists()

    def open(self, shard_id: int, *, wait: bool = True) -> FileIO:
        """Return a shard's verified file, open for reading; it stays readable when evicted.

        DataError names the shard, what the manifest says and what was found. With `wait` False,
        BlockingIOError if another process is about to fetch or verify it.
        """
        shard = self.shards[shard_id]
        if not self.files.max_bytes:
            return self._open_alone(shard)
        try:
            self.files.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            with _locked(self.files.path / f"{shard.sha256}.lock", wait) as seal:
                return self._open_shared(shard, seal)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._cannot_keep(shard, error) from error

    def fetch(self, shard_id: int) -> Path:
        """Return where a verified shard lies."""
        self.open(shard_id).close()
        return self._path(self.shards[shard_id])

    def index(self, shard_id: int) -> bytes:
        """Return the verified .npy file that tells where a shard's samples lie."""
        shard = self.shards[shard_id]
        copy = self._path(shard).with_suffix(".index.npy")
        is_copied = not self.folder.is_local and self.files.max_bytes
        with contextlib.suppress(FileNotFoundError):
            if is_copied and _sha256(content := copy.read_bytes()) == shard.index_sha256:
                return content
        with data_errors(self.folder, shard.index_name):
            content = self.folder.read_bytes(shard.index_name)
        if (found := _sha256(content)) != shard.index_sha256:
            raise self.mismatch(shard.index_name, f"sha256 {shard.index_sha256}", found)
        if is_copied:
            with contextlib.suppress(OSError):  # a second copy is a convenience
                open_folder(copy.parent).write_bytes(copy.name, content)
        return content

    def mismatch(self, name: str, expected: str, found: object) -> DataError:
        """Return the error of a file that is not what the manifest says."""
        return DataError(
            f"shard {name} in {self.folder.url}: the manifest says {expected}, found {found}; "
            "fix: store the shard again, or prepare the data again (dtr-scale prepare)"
        )

    def _path(self, shard: Shard) -> Path:
        if self.folder.is_local:
            return self.folder.local_path / shard.name
        return self.files.path / f"{shard.sha256}.tar"

    def _open_alone(self, shard: Shard) -> FileIO:
        with data_errors(self.folder, _described(shard)):
            if self.folder.is_local:
                file = FileIO(self._path(shard))
            else:
                file = FileIO(os.memfd_create(shard.name), "r+")
            with closed_on_error(file):
                if not self.folder.is_local:
                    self.folder.get_into(shard.name, file)
                if not self.folder.is_local or shard not in self._verified:
                    self._verify(shard, file)
        self._verified.add(shard)
        return file

    def _open_shared(self, shard: Shard, seal: FileIO) -> FileIO:
        if self.folder.is_local:
            with data_errors(self.folder, _described(shard)):
                return self._open_sealed(shard, seal)
        with contextlib.suppress(FileNotFoundError, DataError):
            return self._in_use(self._open_sealed(shard, seal))
        for _ in range(_ATTEMPTS):
            self._fetch(shard)
            try:
                file = self._in_use(self._open_sealed(shard, seal))
            except FileNotFoundError:
                continue  # another process has evicted it at once
            except DataError:
                self._path(shard).unlink(missing_ok=True)
                raise
            self.files.make_room(0)  # for what came at the same time
            return file
        raise OSError(f"evicted {_ATTEMPTS} times as soon as it was there: the cache is too small")

    def _in_use(self, file: FileIO) -> FileIO:
        self.files.use(file)
        return file

    def _open_sealed(self, shard: Shard, seal: FileIO) -> FileIO:
        """Open a file that the seal knows, or verify it and write the seal."""
        with closed_on_error(FileIO(self._path(shard))) as file:
            stat = os.fstat(file.fileno())
            state = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}".encode()
            if seal.read() != state:
                self._verify(shard, file)
                seal.truncate(0)
                seal.write(state)
        return file

    def _verify(self, shard: Shard, file: FileIO) -> None:
        """Compare a file with the manifest; DataError where they differ."""
        found_bytes = os.fstat(file.fileno()).st_size
        file.seek(0)
        found = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        if found_bytes != shard.bytes:
            raise self.mismatch(shard.name, f"bytes {shard.bytes}", found_bytes)
        if found != shard.sha256:
            raise self.mismatch(shard.name, f"sha256 {shard.sha256}", found)

    def _fetch(self, shard: Shard) -> None:
        """Fetch a shard; where the disk is full, after others were evicted."""
        path = self._path(shard)
        for left_over in path.parent.glob(f".{path.name}.*"):  # of a killed process
            left_over.unlink(missing_ok=True)
        self.files.make_room(shard.bytes)
        while True:
            with data_errors(self.folder, _described(shard)):
                try:
                    return self.folder.get(shard.name, path)
                except OSError as error:
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


def _described(shard: Shard) -> str:
    return f"shard {shard.name} ({shard.samples} samples, {shard.bytes} bytes in the manifest)"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextlib.contextmanager
def closed_on_error(file: FileIO) -> Iterator[FileIO]:
    """Close a file if the block that looks into it fails."""
    try:
        yield file
    except BaseException:
        file.close()
        raise


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[FileIO]:
    """Hold a lock among threads and processes; the kernel drops it when the holder dies."""
    with FileIO(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        file.seek(0)
        yield file
