"""One door to files: a folder on a local disk or under an s3:// prefix.

The only module that knows fsspec, s3fs and botocore. What goes wrong is raised as the OSError
family (`FileNotFoundError`, `PermissionError`, `ConnectionError`, ...) for both kinds of folder.
"""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from dtr_scale.errors import ConfigError

_OPTIONS = ("endpoint_url", "key", "secret", "token", "region", "max_attempts")
_PART = ".part"  # ending of temporary names, never listed
_MAX_BUFFERS = os.sysconf("SC_IOV_MAX")  # of one system call
_S3_PART_BYTES = 32 * 2**20  # what one request uploads
_S3_REQUEST_SECONDS = 300.0  # for one request with its retries; refused ones give up after 65
_WRITE_BYTES = 16 * 2**20


class Bytes(Protocol):
    """What can be stored: bytes, a memoryview, or what gives its bytes slice by slice."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


class Folder:
    """A folder at `url`: a local path, or `s3://bucket/prefix`. Picklable and cheap to make.

    S3 takes endpoint, region and keys from the usual AWS environment (AWS_ENDPOINT_URL,
    AWS_DEFAULT_REGION, AWS_ACCESS_KEY_ID, ...) or from `storage_options`: endpoint_url, key,
    secret, token, region, max_attempts. The connection is made at first use, once per process.
    Names are relative to the folder and may contain "/".
    """

    is_local: bool

    def __new__(cls, url: str | Path, storage_options: Mapping[str, Any] | None = None) -> "Folder":
        """Choose the kind of folder by the scheme of `url`."""
        if str(url).startswith("s3:/") and not str(url).startswith("s3://"):
            raise ConfigError(f"{url} is no folder; write s3://bucket/prefix")
        scheme, separator, _ = str(url).partition("://")
        if separator and scheme not in ("file", "s3"):
            raise ConfigError(
                f"unknown kind of folder {scheme}:// in {url}; accepted: a local path, s3://"
            )
        return object.__new__(_S3Folder if separator and scheme == "s3" else _LocalFolder)

    def __init__(self, url: str | Path, storage_options: Mapping[str, Any] | None = None) -> None:
        self.url = str(url).removeprefix("file://").rstrip("/") or "/"
        self._options = dict(storage_options or {})
        if unknown := sorted(set(self._options) - set(_OPTIONS)):
            raise ConfigError(
                f"unknown storage option {unknown[0]}; accepted: {', '.join(_OPTIONS)}"
            )

    def __reduce__(self) -> tuple[type["Folder"], tuple[str, dict[str, Any]]]:
        return Folder, (self.url, self._options)

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"  # never the options: they hold keys

    def child(self, name: str) -> "Folder":
        """Return the folder `name` inside this one."""
        return Folder(f"{self.url.rstrip('/')}/{name}", self._options)

    def read_json(self, name: str) -> Any:  # noqa: ANN401
        """Return the parsed JSON file; ValueError when it is none."""
        return json.loads(self.read_bytes(name))

    @property
    def local_path(self) -> Path:
        """The folder's path on disk; an OSError on S3."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Return the names of the direct children, sorted; [] if the folder does not exist."""
        raise NotImplementedError

    def exists(self, name: str) -> bool:
        """Tell whether the file or folder `name` exists."""
        raise NotImplementedError

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        raise NotImplementedError

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of every file directly in the folder; {} if there is none."""
        raise NotImplementedError

    def read_bytes(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """Return bytes [start, end) of a file."""
        raise NotImplementedError

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """Return bytes [start, end) of each (name, start, end), all asked for at once."""
        raise NotImplementedError

    def read_into(self, name: str, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill one buffer after the other with the bytes of a file from `start` on.

        An OSError if it ends before.
        """
        raise NotImplementedError

    def write_bytes(self, name: str, data: Bytes) -> None:
        """Write a file whole or not at all, and the folders above it."""
        raise NotImplementedError

    def put(self, local_path: Path, name: str) -> None:
        """Store a local file as `name`, whole or not at all, and compare the sizes."""
        raise NotImplementedError

    def get(self, name: str, local_path: Path) -> None:
        """Fetch a file to `local_path`, which appears only when it is whole."""
        raise NotImplementedError

    def get_into(self, name: str, file: FileIO) -> None:
        """Fetch a file into an open one; what arrives after an interruption is the missing rest."""
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Remove a file or a tree; nothing happens if it does not exist."""
        raise NotImplementedError

    def rename(self, old: str, new: str) -> None:
        """Rename a file or folder in one step; an OSError on S3, which cannot."""
        raise NotImplementedError

    def fsync(self) -> None:
        """Make renames inside the folder survive a power cut; S3 needs nothing."""
        raise NotImplementedError

    def _compare_sizes(self, local_path: Path, name: str) -> None:
        sent, stored = local_path.stat().st_size, self.size(name)
        if stored != sent:
            raise OSError(f"{self.url}/{name} has {stored} bytes after writing {sent}")


class _LocalFolder(Folder):
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
        with (self.local_path / name).open("rb", buffering=0) as file:
            for first in range(0, len(buffers), _MAX_BUFFERS):
                some = buffers[first : first + _MAX_BUFFERS]
                if os.preadv(file.fileno(), some, start) < (num_bytes := sum(map(len, some))):
                    raise OSError(f"{self.url}/{name} ends before byte {start + num_bytes}")
                start += num_bytes

    def write_bytes(self, name: str, data: Bytes) -> None:
        with _replacing(self.local_path / name) as temporary:
            with temporary.open("wb") as file:
                for start in range(0, len(data), _WRITE_BYTES):
                    file.write(data[start : start + _WRITE_BYTES])
            _fsync(temporary)

    def put(self, local_path: Path, name: str) -> None:
        with _replacing(self.local_path / name) as temporary:
            shutil.copyfile(local_path, temporary)
            _fsync(temporary)
        self._compare_sizes(local_path, name)

    def get(self, name: str, local_path: Path) -> None:
        with _replacing(local_path) as temporary:
            shutil.copyfile(self.local_path / name, temporary)

    def get_into(self, name: str, file: FileIO) -> None:
        shutil.copyfile(self.local_path / name, f"/proc/self/fd/{file.fileno()}")

    def remove(self, name: str) -> None:
        path = self.local_path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def rename(self, old: str, new: str) -> None:
        (self.local_path / old).rename(self.local_path / new)

    def fsync(self) -> None:
        _fsync(self.local_path)


class _S3Folder(Folder):
    is_local = False

    @property
    def local_path(self) -> Path:
        raise OSError(f"{self.url} has no local path")

    def names(self) -> list[str]:
        try:
            paths = self._call("ls", self.url, detail=False)
        except FileNotFoundError:
            return []
        # A folder made by other tools can list itself as an empty object.
        names = {path.removeprefix(self._root).strip("/") for path in paths}
        return sorted(names - {""})

    def exists(self, name: str) -> bool:
        try:
            self._call("info", self._path(name))
        except FileNotFoundError:
            return False
        return True

    def size(self, name: str) -> int:
        return self._call("info", self._path(name))["size"]

    def sizes(self) -> dict[str, int]:
        try:
            found = self._call("ls", self.url, detail=True)
        except FileNotFoundError:
            return {}
        files = [file for file in found if file["type"] == "file"]
        return {file["name"].rpartition("/")[2]: file["size"] for file in files}

    def read_bytes(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        if end is not None and end <= start:
            return b""  # S3 has no empty range
        # More than one concurrent request gives up on a body cut in mid-stream.
        return self._call(
            "cat_file", self._path(name), start=start or None, end=end, max_concurrency=1
        )

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        names, starts, ends = zip(*ranges, strict=True)
        paths = [self._path(name) for name in names]
        return self._call("cat_ranges", paths, list(starts), list(ends), on_error="raise")

    def read_into(self, name: str, start: int, buffers: Sequence[memoryview]) -> None:
        num_bytes = sum(map(len, buffers))
        data = memoryview(self.read_bytes(name, start, start + num_bytes))
        if len(data) < num_bytes:
            raise OSError(f"{self.url}/{name} ends before byte {start + num_bytes}")
        for buffer in buffers:
            buffer[:], data = data[: len(buffer)], data[len(buffer) :]

    def write_bytes(self, name: str, data: Bytes) -> None:
        parts = bytes(data[:]) if len(data) < 2 * _S3_PART_BYTES else _Parts(data)
        self._call("pipe_file", self._path(name), parts, chunksize=_S3_PART_BYTES)

    def put(self, local_path: Path, name: str) -> None:
        self._call("put_file", str(local_path), self._path(name))
        self._compare_sizes(local_path, name)

    def get(self, name: str, local_path: Path) -> None:
        with _replacing(local_path) as temporary:
            self._get_file(name, str(temporary))

    def get_into(self, name: str, file: FileIO) -> None:
        self._get_file(name, f"/proc/self/fd/{file.fileno()}")

    def _get_file(self, name: str, local_path: str) -> None:
        # One stream, which s3fs takes up where it was cut; it does not mend several.
        self._call("get_file", self._path(name), local_path, max_concurrency=1)

    def remove(self, name: str) -> None:
        # One by one: some servers refuse a bulk DeleteObjects without Content-MD5.
        for path in self._call("find", self._path(name)):
            self._call("rm_file", path)

    def rename(self, old: str, new: str) -> None:
        raise OSError(f"{self.url} is object storage and cannot rename {old} to {new}")

    def fsync(self) -> None:
        pass

    @property
    def _root(self) -> str:
        return self.url.removeprefix("s3://")

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _connect(self) -> Any:  # noqa: ANN401
        """Return the file system of this process: s3fs keeps one per process and options."""
        options = dict(self._options)
        max_attempts = options.pop("max_attempts", 10)
        region = options.pop("region", None)
        connection = _file_system()(
            **options,
            client_kwargs={"region_name": region} if region else {},
            config_kwargs={
                "retries": {"max_attempts": max_attempts, "mode": "standard"},
                # Servers other than AWS refuse the checksums that botocore adds by default.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
            use_listings_cache=False,
        )
        connection.retries = max_attempts + 2  # bodies cut in mid-stream are retried by s3fs
        return connection

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call s3fs and raise nothing but OSErrors."""
        from aiohttp import ClientError as LostConnection
        from botocore import exceptions as botocore

        try:
            return getattr(self._connect(), method)(*args, **kwargs)
        except (botocore.NoCredentialsError, botocore.PartialCredentialsError) as error:
            raise PermissionError(f"{self.url}: {error}") from error
        except (botocore.BotoCoreError, LostConnection, RuntimeError) as error:
            # RuntimeError: aiohttp's, of a session that was closed.
            raise ConnectionError(f"{self.url}: {error}") from error
        except OSError as error:
            if isinstance(error.__cause__, botocore.ClientError):
                raise self._refusal(error, error.__cause__.response) from error
            if isinstance(error, ConnectionError):
                raise ConnectionError(f"{self.url}: {error}") from error
            raise

    def _refusal(self, error: OSError, response: Mapping[str, Any]) -> OSError:
        """Return what s3fs made of a server's answer with the folder and the server's reason."""
        # Ceph gives a code and no message, which s3fs leaves out.
        details = (response["Error"].get(name) for name in ("Code", "Message"))
        reason = f"{self.url}: {': '.join(filter(None, details))}"
        if response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
            return ConnectionError(reason)
        return type(error)(*error.args[:-1], reason)


@functools.cache
def _file_system() -> type:
    """Return s3fs's file system with an end to every request, importing it at first use."""
    import aiohttp
    import s3fs.core
    from botocore.exceptions import HTTPClientError

    # A body can also be lost as a ClientConnectionError, which s3fs does not try again by itself.
    s3fs.core.add_retryable_error(aiohttp.ClientError)

    class FileSystem(s3fs.S3FileSystem):
        async def _call_s3(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            # aiohttp's timeouts do not cover an upload that the server stops reading, and retries
            # of s3fs multiply those of botocore: a silent server would be asked for hours.
            try:
                async with asyncio.timeout(_S3_REQUEST_SECONDS):
                    return await super()._call_s3(*args, **kwargs)
            except TimeoutError as error:
                limit = f"no success within {_S3_REQUEST_SECONDS:g} s"
                raise ConnectionError(f"{self.endpoint_url or 'the server'}: {limit}") from error
            except HTTPClientError as error:  # not to be tried again by the callers, too
                raise ConnectionError(str(error)) from error

    return FileSystem


class _Parts:
    """Slices that are bytes, as botocore takes them: parts are copied one by one."""

    def __init__(self, data: Bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._data[part])


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary neighbour of `path`, which takes its place after a clean exit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{_PART}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
