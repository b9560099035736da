"""Verify every byte of prepared data, and describe what it holds."""

import contextlib
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from dtr_scale.data.manifest import (
    NULL_CONTEXT_NAME,
    Manifest,
    Shard,
    data_errors,
)
from dtr_scale.errors import DataError
from dtr_scale.storage.folder import Folder

_PIECE_BYTES = 32 * 2**20  # what is held in memory of a file that is checked
_THREADS = 4


def verify(folder: Folder, manifest: Manifest) -> Iterator[tuple[str, int, str | None]]:
    """Yield every file's name, bytes, and what is wrong with it (None: nothing).

    Every byte is read and hashed, and every index counted, by a few threads.
    """
    checks = [partial(_check_shard, folder, manifest, shard) for shard in manifest.shards]
    checks += [partial(_check_index, folder, manifest, shard) for shard in manifest.shards]
    if manifest.null_context_sha256 is not None:
        checks.append(partial(_check_null_context, folder, manifest))
    pool = ThreadPoolExecutor(_THREADS)
    try:
        yield from pool.map(lambda check: check(), checks)
    finally:
        # Also where the caller stops early, as by Ctrl-C: what is queued is not read any more.
        pool.shutdown(cancel_futures=True)


def _check_shard(folder: Folder, manifest: Manifest, shard: Shard) -> tuple[str, int, str | None]:
    arrays = _FloatArrays(folder, manifest, shard)
    problem = _problem(folder, shard.name, shard.sha256, shard.bytes, arrays)
    if problem is None and arrays.not_finite:
        some = ", ".join(map(str, sorted(arrays.not_finite)[:10]))
        more = f" and {n} more" if (n := len(arrays.not_finite) - 10) > 0 else ""
        problem = f"numbers that are not finite in samples {some}{more}"
    return shard.name, shard.bytes, problem


class _FloatArrays:
    """The float16 arrays of a shard, checked in the pieces in which it is hashed."""

    def __init__(self, folder: Folder, manifest: Manifest, shard: Shard) -> None:
        self.not_finite: set[int] = set()
        places: list[tuple[int, int, int]] = []  # start, bytes, sample
        for sample, (start, _, tokens, captions) in enumerate(_rows_or_none(folder, shard)):
            if manifest.dtype == "float16":
                places.append((start, 2 * int(np.prod(manifest.stored_shape)), sample))
            if manifest.context_shape is not None:
                places.append((tokens, 2 * captions * int(np.prod(manifest.context_shape)), sample))
        self._places = sorted(places)
        self._starts = np.array([place[0] for place in self._places], np.int64)

    def end_of_piece(self, start: int, end: int) -> int:
        """Return the end of a piece from `start`, about at `end`, that cuts no array."""
        last = int(np.searchsorted(self._starts, end)) - 1  # of those that start before `end`
        # An array that crosses `end` is left to the next piece, or is whole in a longer one.
        if last >= 0 and end < (end_of_last := sum(self._places[last][:2])):
            return int(self._starts[last]) if start < self._starts[last] else end_of_last
        return end

    def check(self, content: bytes, first_byte: int) -> None:
        first = int(np.searchsorted(self._starts, first_byte))
        for start, num_bytes, sample in self._places[first:]:
            offset = start - first_byte
            # The rest lies in later pieces, since a piece cuts no array.
            if offset + num_bytes > len(content):
                break
            if not np.isfinite(np.frombuffer(content, np.float16, num_bytes // 2, offset)).all():
                self.not_finite.add(sample)


def _rows_or_none(folder: Folder, shard: Shard) -> list[list[int]]:
    """Return the rows of a shard's index; none if it is damaged, as its own check tells."""
    with contextlib.suppress(DataError, ValueError, EOFError):
        rows = _index(folder, shard)
        if rows.ndim == 2 and rows.shape[1:] == (4,) and rows.size and rows.min() >= 0:
            return rows.tolist()
    return []


def _check_index(folder: Folder, manifest: Manifest, shard: Shard) -> tuple[str, int, str | None]:
    name = shard.index_name
    problem = _problem(folder, name, shard.index_sha256)
    if problem is None:
        rows = _index(folder, shard)
        labels = rows[:, 1] if len(rows) else np.zeros(1)
        if len(rows) != shard.samples:
            problem = f"{len(rows)} samples, the manifest says {shard.samples}"
        elif not 0 <= labels.min() <= labels.max() < manifest.num_classes:
            problem = f"classes {labels.min()} to {labels.max()} of {manifest.num_classes}"
    return name, 0, problem


def _check_null_context(folder: Folder, manifest: Manifest) -> tuple[str, int, str | None]:
    assert manifest.null_context_sha256 is not None
    problem = _problem(folder, NULL_CONTEXT_NAME, manifest.null_context_sha256)
    if problem is None:
        tokens = np.load(io.BytesIO(folder.read_bytes(NULL_CONTEXT_NAME)))
        if (tokens.shape, tokens.dtype) != (manifest.context_shape, np.float16):
            problem = f"{tokens.dtype} {tokens.shape}, the manifest says {manifest.context_shape}"
    return NULL_CONTEXT_NAME, 0, problem


def _problem(
    folder: Folder,
    name: str,
    sha256: str,
    num_bytes: int | None = None,
    arrays: _FloatArrays | None = None,
) -> str | None:
    """Return what is wrong with a file; a store that does not answer raises a DataError."""
    with data_errors(folder, name):
        try:
            size = folder.size(name)
        except FileNotFoundError:
            return "missing"
        # Told before anything is read, which may be gigabytes.
        if num_bytes is not None and size != num_bytes:
            return f"{size} bytes, the manifest says {num_bytes}"
        digest, start = hashlib.sha256(), 0
        while start < size:
            end = min(size, start + _PIECE_BYTES)
            if arrays is not None:
                end = arrays.end_of_piece(start, end)
            content = folder.read_bytes(name, start, end)
            digest.update(content)
            if arrays is not None:
                arrays.check(content, start)
            start = end
    return None if digest.hexdigest() == sha256 else "its bytes are not those that were written"


def describe(folder: Folder, manifest: Manifest) -> list[str]:
    """Return the lines of a report; the indices are read, the shards are not."""
    stored = f"{manifest.dtype} {list(manifest.stored_shape)}"
    lines = [f"{folder.url}: {manifest.encoding}, stored {stored}, x_start {list(manifest.shape)}"]
    lines.append(f"x_start: stored * {manifest.scale_factor:g} + {manifest.shift:g}")
    if manifest.channel_mean:
        mean = ", ".join(f"{value:.3f}" for value in manifest.channel_mean)
        std = ", ".join(f"{value:.3f}" for value in manifest.channel_std)
        lines.append(f"x_start of train by channel: mean {mean}; standard deviation {std}")
    for what, encoder in (("encoder", manifest.encoder), ("captions", manifest.text_encoder)):
        if encoder is not None:
            sha256 = encoder.sha256[:12]
            lines.append(f"{what}: {encoder.name}, {encoder.precision}, weights {sha256}...")
    for split in dict.fromkeys(shard.split for shard in manifest.shards):
        lines.append(f"{split}: {_describe_split(folder, manifest, split)}")
    if manifest.unreadable:
        lines.append(f"unreadable: {len(manifest.unreadable)}")
        lines += [f"  {name}" for name in manifest.unreadable]
    return lines


def _describe_split(folder: Folder, manifest: Manifest, split: str) -> str:
    shards = manifest.split(split)
    gigabytes = sum(shard.bytes for shard in shards) / 1e9
    classes: Counter[int] = Counter()
    captions = 0
    for shard in shards:
        rows = _index(folder, shard)
        classes.update(rows[:, 1].tolist())
        captions += int(rows[:, 3].sum())
    counts = [classes[label] for label in range(manifest.num_classes)]
    told = f"{manifest.num_samples(split)} samples, {len(shards)} shards, {gigabytes:.3f} GB"
    if captions:
        return f"{told}, {captions} captions"
    return f"{told}, {len(counts)} classes of {min(counts)} to {max(counts)} samples"


def evenly_spread(manifest: Manifest, split: str, num: int) -> np.ndarray:
    """Return up to `num` places, spread evenly over a split, int64 [n]."""
    num = min(num, manifest.num_samples(split))
    return np.arange(num) * manifest.num_samples(split) // num


def places_by_class(
    folder: Folder, manifest: Manifest, split: str, per_class: int
) -> np.ndarray | None:
    """Return the first places of each class in turn, int64 [per_class or fewer x classes].

    None where a class has no samples. All indices of the split are read.
    """
    labels = np.concatenate([_index(folder, shard)[:, 1] for shard in manifest.split(split)])
    found = [np.flatnonzero(labels == k)[:per_class] for k in range(manifest.num_classes)]
    rows = min(map(len, found))
    return np.stack([places[:rows] for places in found], axis=1).ravel() if rows else None


def read_samples(
    folder: Folder, manifest: Manifest, split: str, places: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    """Return x_start [n, C, H, W] and class of the samples at `places` int [n] of a split.

    Each is one ranged read; nothing else of a shard is fetched.
    """
    order = np.argsort(places, kind="stable")
    x_start, labels = _read_rising(folder, manifest, split, places[order])
    back = np.argsort(order, kind="stable")
    return x_start[back], [labels[place] for place in back]


def _read_rising(
    folder: Folder, manifest: Manifest, split: str, places: np.ndarray
) -> tuple[np.ndarray, list[int]]:
    arrays, labels, first = [], [], 0
    dtype, shape = np.dtype(manifest.dtype), manifest.stored_shape
    num_bytes = dtype.itemsize * int(np.prod(shape))
    for shard in manifest.split(split):
        inside = places[(places >= first) & (places < first + shard.samples)] - first
        rows = _index(folder, shard)[inside] if len(inside) else []
        for start, label, *_ in rows:
            with data_errors(folder, shard.name):
                content = folder.read_bytes(shard.name, int(start), int(start) + num_bytes)
            if len(content) != num_bytes:
                raise DataError(f"{folder.url}/{shard.name} is cut; see dtr-scale data verify")
            stored = np.frombuffer(content, dtype).reshape(shape)
            arrays.append(manifest.decode(stored))
            labels.append(int(label))
        first += shard.samples
    return np.stack(arrays), labels


def _index(folder: Folder, shard: Shard) -> np.ndarray:
    with data_errors(folder, shard.index_name):
        return np.load(io.BytesIO(folder.read_bytes(shard.index_name)))
