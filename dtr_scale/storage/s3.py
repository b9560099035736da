"""Keep a folder under an s3:// prefix.

The only module that knows s3fs, aiohttp and botocore.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import aiohttp
import botocore.exceptions as botocore
import s3fs
import s3fs.core
from s3fs.errors import translate_boto_error

from dtr_scale.storage.folder import Bytes, Folder
from dtr_scale.storage.local import replacing

log = logging.getLogger(__name__)

_PART_BYTES = 32 * 2**20  # what one request uploads
_REQUEST_SECONDS = 300.0  # for one request with its retries
_MAX_ATTEMPTS = 15  # with the waits between them about a minute
_LONGEST_WAIT_SECONDS = 8.0
_TELL_SECONDS = 3.0  # between two lines about retries, which may come from many requests at once
_PATIENCE_SECONDS = 9.0  # for an answer, before a line says that there is none yet
_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "Throttling", "XAmzContentSHA256Mismatch"}
_UNFINISHED = "UNFINISHED"  # the object in a folder that is not published yet

# A body can also be lost as a ClientConnectionError, which s3fs does not try again by itself.
s3fs.core.add_retryable_error(aiohttp.ClientError)


class S3Folder(Folder):
    """A folder on S3. It cannot be renamed: what is staged holds an object UNFINISHED."""

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

    def modified(self, name: str) -> float:
        return self._call("modified", self._path(name)).timestamp()

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
        # More than one concurrent request gives up on a body cut in mid-stream. A start of 0 is
        # left out, since an empty object refuses every range.
        return self._call(
            "cat_file", self._path(name), start=start or None, end=end, max_concurrency=1
        )

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        asked = [each for each in ranges if each[1] < each[2]]  # S3 has no empty range
        paths = [self._path(name) for name, _, _ in asked]
        starts, ends = [start for _, start, _ in asked], [end for _, _, end in asked]
        found = iter(self._call("cat_ranges", paths, starts, ends, on_error="raise"))
        return [next(found) if start < end else b"" for _, start, end in ranges]

    def read_into(self, name: str, start: int, buffers: Sequence[memoryview]) -> None:
        num_bytes = sum(map(len, buffers))
        data = memoryview(self.read_bytes(name, start, start + num_bytes))
        if len(data) < num_bytes:
            raise OSError(f"{self.url}/{name} ends before byte {start + num_bytes}")
        for buffer in buffers:
            buffer[:], data = data[: len(buffer)], data[len(buffer) :]

    def write_bytes(self, name: str, data: Bytes) -> None:
        # s3fs sends less than two parts in one request, whose body must be bytes. More than that it
        # slices part by part, so memory never holds a copy of the whole.
        parts = bytes(data[:]) if len(data) < 2 * _PART_BYTES else _Parts(data)
        self._call("pipe_file", self._path(name), parts, chunksize=_PART_BYTES)

    def create(self, name: str, data: bytes) -> bool:
        try:
            self._call("pipe_file", self._path(name), data, mode="create")  # If-None-Match: *
        except (ConnectionError, PermissionError):
            raise
        except OSError:
            # s3fs has no error of its own for PreconditionFailed, nor for the conflict of two.
            if not self.exists(name):
                raise
            return False
        return True

    def get(self, name: str, local_path: Path) -> None:
        with replacing(local_path) as temporary:
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

    def staged(self, name: str) -> "S3Folder":
        return self.child(name)

    def stage(self, name: str) -> None:
        # UNFINISHED comes before any other object, since a folder without it counts as published.
        self.remove(name)
        self.write_bytes(f"{name}/{_UNFINISHED}", b"")

    def publish(self, name: str, mark: str, content: bytes) -> None:
        self.write_bytes(f"{name}/{mark}", content)
        self.remove(f"{name}/{_UNFINISHED}")

    def is_published(self, name: str, mark: str) -> bool:
        # Both are there if a kill came between the mark and the removal: it was published.
        children = self.child(name).names()
        return mark in children or _UNFINISHED not in children

    def unstage(self, name: str) -> None:
        """Leave it: object storage does not fill up, and the next `stage` removes it."""

    def discard(self, name: str) -> None:
        self.remove(name)

    @property
    def _root(self) -> str:
        return self.url.removeprefix("s3://")

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def _connect(self) -> Any:  # noqa: ANN401
        """Return the file system of this process: s3fs keeps one per process and options."""
        options = dict(self._options)
        max_attempts = options.pop("max_attempts", _MAX_ATTEMPTS)
        region = options.pop("region", None)
        connection = _FileSystem(
            **options,
            client_kwargs={"region_name": region} if region else {},
            config_kwargs={
                # None of botocore's, which are silent: `_FileSystem` tries again.
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                # Servers other than AWS refuse the checksums that botocore adds by default.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
            # Other ranks and jobs write to the same folders, which a kept listing would not show.
            use_listings_cache=False,
        )
        # Set on every call: these are no options, and s3fs returns one instance for equal options.
        connection.max_attempts = max_attempts
        connection.retries = max_attempts + 2  # bodies cut in mid-stream are retried by s3fs
        return connection

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Call s3fs and raise nothing but OSErrors."""
        try:
            return getattr(self._connect(), method)(*args, **kwargs)
        except (botocore.NoCredentialsError, botocore.PartialCredentialsError) as error:
            raise PermissionError(f"{self.url}: {error}") from error
        except (botocore.BotoCoreError, aiohttp.ClientError, RuntimeError) as error:
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


class _FileSystem(s3fs.S3FileSystem):
    """s3fs with one policy of retries for requests, which says what it waits for."""

    max_attempts = _MAX_ATTEMPTS
    _told_at = 0.0

    # s3fs sends every request through this method, which is private to it. If it is renamed there,
    # requests fall back to s3fs's own retries.
    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        # In place of s3fs's own, whose retries multiply those of botocore, both in silence.
        what = "/".join(filter(None, (kwargs.get("Bucket"), kwargs.get("Key"))))
        try:
            # aiohttp's timeouts do not cover an upload that the server stops reading.
            async with asyncio.timeout(_REQUEST_SECONDS):
                for attempt in range(1, self.max_attempts):
                    try:
                        return await self._try(what, method, *args, **kwargs)
                    except Exception as error:
                        if not _is_transient(error):
                            raise
                        self._tell(f"{what}: {error}; retrying ({attempt} of {self.max_attempts})")
                    # Half of it random: ranks that failed together do not come back together.
                    wait = min(0.1 * 2 ** (attempt - 1), _LONGEST_WAIT_SECONDS)
                    await asyncio.sleep(wait * random.uniform(0.5, 1))
                # The last attempt: its error is raised, transient or not.
                return await self._try(what, method, *args, **kwargs)
        except TimeoutError as error:
            limit = f"no success within {_REQUEST_SECONDS:g} s"
            raise ConnectionError(f"{self.endpoint_url or 'the server'}: {limit}") from error
        except botocore.ClientError as error:
            raise translate_boto_error(error) from error
        except (botocore.HTTPClientError, botocore.ConnectionError) as error:
            # As no error that s3fs knows: it would try again what was tried enough.
            raise ConnectionError(_distrust(error) or str(error)) from error

    async def _try(self, what: str, method: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        # As s3fs calls a method of botocore; `_get_s3_method_kwargs` is private to it.
        await self.set_session()
        call = getattr(await self.get_s3(kwargs.get("Bucket")), method)
        async with _telling_of_silence(what):
            return await call(**self._get_s3_method_kwargs(call, *args, **kwargs))

    def _tell(self, message: str) -> None:
        if time.monotonic() - self._told_at >= _TELL_SECONDS:
            self._told_at = time.monotonic()
            log.warning("s3://%s", " ".join(message.split()))


@contextlib.asynccontextmanager
async def _telling_of_silence(what: str) -> AsyncIterator[None]:
    """Log every few seconds that a request has no answer yet."""

    async def tell() -> None:
        started = time.monotonic()
        while True:
            await asyncio.sleep(_PATIENCE_SECONDS)
            log.warning("s3://%s: no answer for %.0f s", what, time.monotonic() - started)

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()


def _is_transient(error: Exception) -> bool:
    """Tell whether the same request may succeed a little later."""
    if isinstance(error, botocore.ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status == 429 or error.response["Error"]["Code"] in _TRANSIENT_CODES
    if _distrust(error):
        return False
    # The timeout of the whole request arrives as a cancellation, not as one of these.
    return isinstance(error, (*s3fs.core.S3_RETRYABLE_ERRORS, botocore.ConnectionError))


def _distrust(error: BaseException) -> str:
    """Return why the server's certificate is not trusted and the fix; "" for any other error."""
    cause: BaseException | None = error
    while cause:
        reason = getattr(cause, "verify_message", "")  # of ssl.SSLCertVerificationError
        # A connection opens no other file than the bundle.
        is_no_bundle = getattr(cause, "reason", "") == "NO_CERTIFICATE_OR_CRL_FOUND"
        if is_no_bundle or isinstance(cause, FileNotFoundError):
            reason = "the file that AWS_CA_BUNDLE names is missing or holds none"
        if reason:
            return (
                f"the server's certificate is not trusted: {reason}; "
                "set AWS_CA_BUNDLE to the certificate of the authority that signed it"
            )
        cause = cause.__cause__ or cause.__context__
    return ""


class _Parts:
    """Slices that are bytes, as botocore takes them: parts are copied one by one."""

    def __init__(self, data: Bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, part: slice) -> bytes:
        return bytes(self._data[part])
