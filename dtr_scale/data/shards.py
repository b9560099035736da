"""Open shards where they lie or in memory, or read single samples of one on its way here.

A shard is opened whole and verified, and stays readable until it is closed. `RangedShard` alone is
not verified: it stands in for a shard that is on its way, and is verified with it.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from io import FileIO
from typing import Protocol

import numpy as np

from dtr_scale.data.seals import ProcessSeals, Seals
from dtr_scale.data.split import Split


class OpenShard(Protocol):
    """A shard that can be read."""

    rows: np.ndarray
    """Where the samples lie, int64 [samples, 4]; see `dtr_scale.prepare.writer`."""

    def read(self, offsets: Sequence[int], buffer: Sequence[np.ndarray]) -> Callable[[], None]:
        """Fill arrays of bytes with what stands at the offsets, and return what ends it.

        The arrays are filled once that is called: it waits for requests that are under way, so
        that those to several shards run at once.
        """
        ...

    def close(self) -> None:
        """Free what the shard holds."""
        ...


class Shards(Protocol):
    """The shards of a split, one way to each of them."""

    split: Split

    def open(self, i: int, wait: bool = True) -> OpenShard:
        """Return a shard, verified; DataError names it and what is wrong.

        With `wait` False, BlockingIOError if another process is about to fetch or verify it.
        """
        ...

    def ranged(self, i: int) -> "RangedShard | None":
        """Return what reads single samples while the shard is fetched; None: it is at hand."""
        return None

    def expect(self, next_uses: Callable[[], Iterable[int]]) -> None:
        """Tell in which order shards will be needed, for whoever has to give some up."""


class FileShard:
    """A whole, verified shard in an open file."""

    def __init__(self, split: Split, i: int, file: FileIO, rows: np.ndarray) -> None:
        split.check_header(i, file, rows)
        self.rows = rows
        self._split = split
        self._i = i
        self._file = file

    def read(self, offsets: Sequence[int], buffer: Sequence[np.ndarray]) -> Callable[[], None]:
        """Fill the buffer now."""
        descriptor = self._file.fileno()
        for offset, part in zip(offsets, buffer, strict=True):
            # Straight into the batch's buffer, without bytes in between.
            found = os.preadv(descriptor, [part], offset)  # pyright: ignore[reportArgumentType]
            if found != len(part):
                raise self._split.error(self._i, f"{len(part)} bytes at {offset}", found)
        return _nothing_to_wait_for

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class RangedShard:
    """A shard that is still away, by one request per sample."""

    def __init__(self, split: Split, i: int, rows: np.ndarray) -> None:
        self.rows = rows
        self.num_requests = 0
        self._split = split
        self._i = i

    def read(self, offsets: Sequence[int], buffer: Sequence[np.ndarray]) -> Callable[[], None]:
        """Ask for all at once; what storage raises comes out of the waiting, as an OSError."""
        name = self._split.shards[self._i].name
        ends = [at + len(part) for at, part in zip(offsets, buffer, strict=True)]
        ranges = [(name, at, end) for at, end in zip(offsets, ends, strict=True)]
        self.num_requests += len(ranges)
        asked = _in_background(lambda: self._split.folder.read_ranges(ranges))

        def fill() -> None:
            # Copied here, by whoever waits: a request that nobody waits for any more, after the
            # error of another, must not write into a buffer that is used again.
            for part, offset, content in zip(buffer, offsets, asked.result(), strict=True):
                if len(content) != len(part):
                    expected = f"{len(part)} bytes at {offset}"
                    raise self._split.error(self._i, expected, len(content))
                part[:] = np.frombuffer(content, np.uint8)

        return fill

    def close(self) -> None:
        """Nothing is held."""


class LocalShards(Shards):
    """Shards in a local folder, used where they lie."""

    def __init__(self, split: Split, seals: Seals) -> None:
        self.split = split
        self._seals = seals

    def open(self, i: int, wait: bool = True) -> FileShard:
        """Return a shard's file, hashed if nobody has done so."""
        split, shard = self.split, self.split.shards[i]
        rows = split.rows(i, split.read_index(i))
        with (
            self._seals.hold(shard.sha256, wait) as seal,
            split.reading(i),
            closed_on_error(FileIO(split.folder.local_path / shard.name)) as file,
        ):
            split.verify(i, file, seal)
            return FileShard(split, i, file, rows)


class MemoryShards(Shards):
    """Shards of object storage in this process's memory, where no disk may be used."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def open(self, i: int, wait: bool = True) -> FileShard:
        """Fetch a shard into a file without a name, and hash it."""
        split, name = self.split, self.split.shards[i].name
        rows = split.rows(i, split.read_index(i))
        # The kernel frees a file without a name with its last descriptor, even after a kill.
        with closed_on_error(FileIO(os.memfd_create(name), "r+")) as file:
            # A new seal each time: what has come over the network is always hashed.
            with split.reading(i), ProcessSeals().hold(name, wait) as seal:
                split.folder.get_into(name, file)
                split.verify(i, file, seal)
            return FileShard(split, i, file, rows)

    def ranged(self, i: int) -> RangedShard:
        """Return what reads single samples: the shard is never at hand before it is opened."""
        return RangedShard(self.split, i, self.split.rows(i, self.split.read_index(i)))


@contextlib.contextmanager
def closed_on_error(file: FileIO) -> Iterator[FileIO]:
    """Close a file if the block that looks into it fails."""
    try:
        yield file
    except BaseException:
        file.close()
        raise


def _nothing_to_wait_for() -> None:
    """Return at once."""


def _in_background(work: Callable[[], list[bytes]]) -> Future[list[bytes]]:
    """Run in a daemon thread: an executor's would hold up the process's end until it is done."""
    future: Future[list[bytes]] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="range-requests", daemon=True).start()
    return future
