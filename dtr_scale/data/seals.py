"""Remember which files were verified, so that the processes of a node hash each of them once.

A seal holds the inode, size and time of a file that was hashed: a file that differs in one of them
is hashed again. In a folder it is a lock file too, so that one process at a time fetches or hashes
what the seal is about.
"""

import collections
import contextlib
import errno
import fcntl
import io
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Protocol

from dtr_scale.errors import DataError

_FIX = "fix: set data.cache_dir to a new folder, which is then made for you alone"


class Seal:
    """The note of which file was verified, while nobody else holds it."""

    def __init__(self, note: BinaryIO) -> None:
        self._note = note

    def fits(self, file: FileIO) -> bool:
        """Tell whether this very file was verified, and has not changed since."""
        self._note.seek(0)
        return self._note.read() == _state(file)

    def set(self, file: FileIO) -> None:
        """Note that a file is verified."""
        self._note.seek(0)
        # In this order: a kill in between leaves an empty note, which fits no file.
        self._note.truncate()
        self._note.write(_state(file))


class Seals(Protocol):
    """Seals by name."""

    def hold(self, name: str, wait: bool) -> AbstractContextManager[Seal]:
        """Hold a seal; BlockingIOError if another holds it and `wait` is False."""
        ...


class ProcessSeals(Seals):
    """Seals in the memory of one process, which opens a file in one thread at a time."""

    def __init__(self) -> None:
        self._notes: dict[str, io.BytesIO] = collections.defaultdict(io.BytesIO)

    def hold(self, name: str, wait: bool) -> AbstractContextManager[Seal]:
        """Return the seal."""
        return contextlib.nullcontext(Seal(self._notes[name]))


class FolderSeals(Seals):
    """Seals in a folder of this user's, for all processes of a node."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def hold(self, name: str, wait: bool) -> Iterator[Seal]:
        """Hold a seal among threads and processes; the kernel drops it when the holder dies."""
        make_private(self.path)
        with contextlib.ExitStack() as held:
            try:
                file = held.enter_context(open_lock(self.path / f"{name}.lock"))
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # An OSError, too, but no fault: the prefetcher goes on with other shards.
            except BlockingIOError:
                raise
            except OSError as error:
                raise _unusable(self.path, error) from error
            yield Seal(file)


def own_folder(path: Path) -> Path:
    """Return the folder to use at `path`: one of our own inside a scratch folder that users share.

    Such as a node's /scratch or a container's volume: of root or ours, and open to all.
    """
    try:
        found = path.lstat()
    except OSError:
        return path  # to be made
    shared = stat.S_ISDIR(found.st_mode) and found.st_mode & 0o022
    if shared and found.st_uid in (0, os.geteuid()):
        return path / f"dtr_scale-{os.geteuid()}"
    return path


def make_private(path: Path) -> None:
    """Make a folder that no other user can write to; DataError if it exists and is another's.

    In a folder of somebody else's, or open to all, another user could put links in the place of our
    files, or alter a shard after it was verified.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise _unusable(path, error) from error
    if stat.S_ISLNK(found.st_mode):
        raise DataError(f"the cache {path} is a link; fix: set data.cache_dir to what it leads to")
    if found.st_uid != os.geteuid():
        owner = f"user {found.st_uid}, not to user {os.geteuid()} who runs this"
        raise DataError(f"the cache {path} belongs to {owner}; {_FIX}")
    if found.st_mode & 0o022:
        mode = f"has mode {stat.S_IMODE(found.st_mode):04o}: other users can write to it"
        raise DataError(f"the cache {path} {mode}; {_FIX} (or: chmod go-w {path})")


def open_lock(path: Path) -> FileIO:
    """Open a lock file for reading and writing, made if need be; DataError where it is a link."""
    return FileIO(path, "r+", opener=_open_private)


def open_copy(path: Path) -> FileIO:
    """Open a cached shard for reading; DataError where it is a link."""
    return FileIO(path, opener=_open_no_link)


def _open_private(path: str, flags: int) -> int:
    return _open_no_link(path, flags | os.O_CREAT)


def _open_no_link(path: str, flags: int) -> int:
    # A link would have us write to, or trust, a file of whoever made it.
    try:
        return os.open(path, flags | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise DataError(f"{path} is a link, which no cache holds; fix: remove it") from error


def _unusable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache {path} cannot be used ({error}); fix: set data.cache_dir to a folder on a disk "
        "with room, or data.cache_gb=0 for none"
    )


def _state(file: FileIO) -> bytes:
    # Not the time of change: `CacheFolder.use` sets the time of reading, and so moves it.
    found = os.fstat(file.fileno())
    return f"{found.st_ino} {found.st_size} {found.st_mtime_ns}".encode()
