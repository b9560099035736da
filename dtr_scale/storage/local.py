"""Keep a folder on a local disk: files are replaced by renaming, and synced before they count."""

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path

from dtr_scale.storage.folder import Bytes, Folder

_PART = ".part"  # ending of temporary names, never listed
_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")  # of one system call
_WRITE_BYTES = 16 * 2**20
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}
"""From file systems without hard links: exFAT, object storage mounted as a folder."""


class LocalFolder(Folder):
    """A folder on disk. What is staged is hidden: it is `.NAME.tmp` until it is renamed."""

    is_local = True

    @property
    def local_path(self) -> Path:
        return Path(self.url)

    def names(self) -> list[str]:
        if not self.local_path.is_dir():
            return []
        return sorted(
            path.name for path in self.local_path.iterdir() if not path.name.endswith(_PART)
        )

    def exists(self, name: str) -> bool:
        return (self.local_path / name).exists()

    def size(self, name: str) -> int:
        return (self.local_path / name).stat().st_size

    def modified(self, name: str) -> float:
        return (self.local_path / name).stat().st_mtime

    def sizes(self) -> dict[str, int]:
        if not self.local_path.is_dir():
            return {}
        with os.scandir(self.local_path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read_bytes(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        with (self.local_path / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        return [self.read_bytes(*each) for each in ranges]

    def read_into(self, name: str, start: int, buffers: Sequence[memoryview]) -> None:
        # One system call fills many buffers where they are; `file.read` would copy every byte.
        with (self.local_path / name).open("rb", buffering=0) as file:
            for first in range(0, len(buffers), _MAX_BUFFERS):
                some = buffers[first : first + _MAX_BUFFERS]
                if os.preadv(file.fileno(), some, start) < (num_bytes := sum(map(len, some))):
                    raise OSError(f"{self.url}/{name} ends before byte {start + num_bytes}")
                start += num_bytes

    def get(self, name: str, local_path: Path) -> None:
        with replacing(local_path) as temporary:
            shutil.copyfile(self.local_path / name, temporary)

    def get_into(self, name: str, file: FileIO) -> None:
        # By descriptor: the file may have no name any more.
        shutil.copyfile(self.local_path / name, f"/proc/self/fd/{file.fileno()}")

    def write_bytes(self, name: str, data: Bytes) -> None:
        with replacing(self.local_path / name) as temporary:
            with temporary.open("wb") as file:
                # Slice by slice: `data` may make its bytes on demand (see `Bytes`).
                for start in range(0, len(data), _WRITE_BYTES):
                    file.write(data[start : start + _WRITE_BYTES])
            # Before the rename: a power cut could keep the name and lose the content.
            _fsync(temporary)

    def create(self, name: str, data: bytes) -> bool:
        path = self.local_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link and not a rename, which would replace the file of whoever was first.
        whole = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_PART}")
        try:
            whole.write_bytes(data)
            os.link(whole, path)  # appears whole, or there was one already
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _create_in_place(path, data)
        finally:
            whole.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> None:
        path = self.local_path / name
        # What a link leads to belongs to somebody else: the link alone goes.
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def rename(self, old: str, new: str) -> None:
        """Rename a file or folder in one step."""
        (self.local_path / old).rename(self.local_path / new)

    def staged(self, name: str) -> "LocalFolder":
        return self.child(f".{name}.tmp")

    def stage(self, name: str) -> None:
        self.remove(f".{name}.tmp")

    def publish(self, name: str, mark: str, content: bytes) -> None:
        staged = self.staged(name)
        staged.write_bytes(mark, content)
        # The names of the files must be on disk before the rename, and the rename before whoever
        # is told of it throws older folders away.
        _fsync(staged.local_path)
        # A folder that holds files cannot be replaced by a rename.
        self.discard(name)
        self.rename(f".{name}.tmp", name)
        _fsync(self.local_path)

    def is_published(self, name: str, mark: str) -> bool:
        return not name.startswith(".")

    def unstage(self, name: str) -> None:
        self.remove(f".{name}.tmp")

    def discard(self, name: str) -> None:
        if self.exists(name):
            # What a kill between these lines left behind would stop the next rename.
            self.remove(f".{name}.old")
            # In one step: half a folder must not be found under the published name.
            self.rename(name, f".{name}.old")
            self.remove(f".{name}.old")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of `path`, which takes its place after a clean exit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Threads and processes may write the same file at once: each has a name of its own.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_PART}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _create_in_place(path: Path, data: bytes) -> bool:
    try:
        with path.open("xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


# By a new descriptor: what is synced is the file, whoever wrote to it. A folder has no other way.
def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
