"""Read and write files in a folder, on a local disk or on S3, through one interface.

What goes wrong is raised as the OSError family (`FileNotFoundError`, `PermissionError`,
`ConnectionError`, ...) for both kinds of folder.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from dtr_scale.errors import ConfigError

_OPTIONS = ("endpoint_url", "key", "secret", "token", "region", "max_attempts")


class Bytes(Protocol):
    """Content to store: bytes, a memoryview, or an object that makes its bytes by slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


def open_folder(url: str | Path, storage_options: Mapping[str, Any] | None = None) -> "Folder":
    """Return the folder at `url`, a local path or s3://bucket/prefix; ConfigError for another.

    S3 takes endpoint, region and keys from the usual AWS environment (AWS_ENDPOINT_URL,
    AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, ...) or from `storage_options`: endpoint_url, key,
    secret, token, region, max_attempts.
    """
    scheme, separator, _ = str(url).partition("://")
    if separator and scheme == "s3":
        from dtr_scale.storage.s3 import S3Folder  # takes a second: not for those with disks alone

        return S3Folder(str(url), storage_options)
    if separator and scheme != "file":
        raise ConfigError(
            f"unknown kind of folder {scheme}:// in {url}; accepted: a local path, s3://"
        )
    # A URL that went through pathlib has lost a slash, and would name a folder s3: on this disk.
    if str(url).startswith("s3:/"):
        raise ConfigError(f"{url} is no folder; write s3://bucket/prefix")
    from dtr_scale.storage.local import LocalFolder

    return LocalFolder(str(url).removeprefix("file://"), storage_options)


class Folder(ABC):
    """A folder whose files are read and written whole, or read by ranges.

    Picklable and cheap to make: a connection is made at first use, once per process. Names are
    relative to the folder and may contain "/".
    """

    is_local: ClassVar[bool]

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None) -> None:
        # Without the "or", the root of the disk would become the working directory.
        self.url = url.rstrip("/") or "/"
        self._options = dict(storage_options or {})
        if unknown := sorted(set(self._options) - set(_OPTIONS)):
            raise ConfigError(
                f"unknown storage option {unknown[0]}; accepted: {', '.join(_OPTIONS)}"
            )

    # A copy in another process connects by itself: s3fs refuses a connection made before a fork.
    def __reduce__(self) -> tuple[type[Self], tuple[str, dict[str, Any]]]:
        return type(self), (self.url, self._options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"  # never the options: they hold keys

    def child(self, name: str) -> Self:
        """Return the folder `name` inside this one."""
        return type(self)(f"{self.url.rstrip('/')}/{name}", self._options)

    def read_json(self, name: str) -> Any:  # noqa: ANN401
        """Return the parsed JSON file; ValueError when it is none."""
        return json.loads(self.read_bytes(name))

    @property
    @abstractmethod
    def local_path(self) -> Path:
        """The folder's path on disk; an OSError on S3."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of the direct children, sorted; [] if the folder does not exist."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Tell whether the file or folder `name` exists."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """Return when a file was written, in seconds since 1970 by the storage's clock."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file directly in the folder; {} if there is none."""

    @abstractmethod
    def read_bytes(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes [start, end) of a file."""

    @abstractmethod
    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return bytes [start, end) of each (name, start, end), all asked for at once."""

    @abstractmethod
    def read_into(self, name: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill one buffer after the other with the bytes of a file from `start` on.

        An OSError if it ends before.
        """

    @abstractmethod
    def get(self, name: str, local_path: Path) -> None:
        """Fetch a file to `local_path`, which appears only when it is whole."""

    @abstractmethod
    def get_into(self, name: str, file: FileIO) -> None:
        """Fetch a file into an open one; after an interruption the missing rest follows."""

    @abstractmethod
    def write_bytes(self, name: str, data: Bytes) -> None:
        """Write a file whole or not at all, and the folders above it."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write a file that does not exist yet; False if it does, whoever was first."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a file or a tree; nothing happens if it does not exist."""

    @abstractmethod
    def staged(self, name: str) -> Self:
        """Return the folder that several processes fill before it is published as `name`."""

    @abstractmethod
    def stage(self, name: str) -> None:
        """Make room for `staged(name)`: what was left there is removed."""

    @abstractmethod
    def publish(self, name: str, mark: str, content: bytes) -> None:
        """Write the file `mark` to `staged(name)`, last of all, and make it count as `name`.

        It survives a power cut, and replaces a folder of that name.
        """

    @abstractmethod
    def is_published(self, name: str, mark: str) -> bool:
        """Tell whether the folder `name` was published once, not whether it is still whole."""

    @abstractmethod
    def unstage(self, name: str) -> None:
        """Give back at once what `staged(name)` takes of a disk that may be full."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Remove a published folder; on disk a kill in between leaves nothing of it as `name`."""
