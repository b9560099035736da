"""Read a checkpoint: the blocks that are needed, each once, each verified."""

import json
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from dtr_scale.checkpoint import layout
from dtr_scale.checkpoint.layout import (
    COMPLETE,
    FORMAT,
    INDEX,
    ITEM_BYTES,
    complete_mark,
)
from dtr_scale.engines.base import Piece
from dtr_scale.errors import CheckpointError, ConfigError, DamagedCheckpointError
from dtr_scale.storage.folder import Folder

_NUM_THREADS = 2
"""Blocks that are read at a time; from the tests' S3 server four were no faster."""


class _Part(NamedTuple):
    """Bytes of a block that belong to bytes of a wanted piece."""

    start: int
    target: Tensor


class CheckpointReader:
    """One complete checkpoint; every byte read is checked against the index.

    Raises DamagedCheckpointError naming the file when anything is missing, cut or altered, and
    CheckpointError when it cannot be read at all.
    """

    def __init__(self, folder: Folder) -> None:
        self.url = folder.url
        self._folder = folder
        with self._reading(INDEX):
            index = folder.read_bytes(INDEX)
        with self._reading(COMPLETE):
            mark = folder.read_bytes(COMPLETE)
        # The mark holds the hash of the index, and the index those of all blocks: all is verified
        # from here.
        if mark != complete_mark(index):
            raise DamagedCheckpointError(
                f"{self.url}: {INDEX} is not the one that {COMPLETE} names"
            )
        content = json.loads(index)
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{self.url} has format {content['format']}; this version reads {FORMAT}"
            )
        self.meta: dict[str, Any] = content["meta"]
        self._block_bytes = layout.BLOCK_BYTES
        self._files: dict[str, Any] = content["files"]
        self._tensors: dict[str, Any] = content["tensors"]
        if odd := [name for name in self._files if not layout.is_rank_file(name)]:
            raise DamagedCheckpointError(
                f"{self.url}: {INDEX} names the file {odd[0]!r}, which no checkpoint has"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors by key."""
        return {key: tuple(tensor["shape"]) for key, tensor in self._tensors.items()}

    @property
    def file_sizes(self) -> dict[str, int]:
        """Bytes of all files by name, as they must be."""
        return {name: file["bytes"] for name, file in self._files.items()}

    def check_file(self, name: str) -> None:
        """Read a file through; DamagedCheckpointError at the first block that is not as written."""
        self.check_sizes([name])
        scratch = torch.empty(self._block_bytes, dtype=torch.uint8)
        for number in range(len(self._files[name]["blocks"])):
            self._read_block(name, number, [], scratch)

    def check_sizes(self, names: Iterable[str] | None = None) -> None:
        """Check that files, all or the named ones, are there in full: this reads none of them."""
        for name in self._files if names is None else names:
            if name not in self._files:
                raise DamagedCheckpointError(f"{self.url}: {INDEX} lists no file {name!r}")
            with self._reading(name):
                found = self._folder.size(name)
            expected = self._files[name]["bytes"]
            if found != expected:
                raise DamagedCheckpointError(
                    f"{self.url}: {name} has {found} bytes, its index {expected}"
                )

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """Return whole tensors, fp32, in their shapes."""
        pieces: dict[str, Piece] = {}
        for key in keys:
            shape = self._shape(key)
            if shape is None:
                raise ConfigError(f"{self.url} is of another network: it has no {key}")
            pieces[key] = Piece(shape, 0, torch.empty(prod(shape)))
        self.read_into(pieces)
        return {key: piece.data.view(piece.shape) for key, piece in pieces.items()}

    def read_into(self, wanted: Mapping[str, Piece]) -> None:
        """Copy what is stored into the wanted pieces; after an error some of them are overwritten.

        ConfigError, before any is, if the checkpoint is of another network or objective.
        """
        self._check_shapes(wanted)
        blocks = self._parts_by_block(wanted)
        # A file that was cut is found here, before anything is overwritten.
        self.check_sizes(sorted({name for name, _ in blocks}))
        own, pinned = threading.local(), torch.cuda.is_available()
        scratches = [
            torch.empty(self._block_bytes, dtype=torch.uint8, pin_memory=pinned)
            for _ in range(_NUM_THREADS)
        ]

        def begin() -> None:
            # A block passes through a thread's own scratch, unless it is read into host memory.
            own.scratch = scratches.pop()

        def read(place: tuple[str, int]) -> None:
            self._read_block(*place, blocks[place], own.scratch)

        pool = ThreadPoolExecutor(_NUM_THREADS, initializer=begin)
        try:
            for done in [pool.submit(read, place) for place in sorted(blocks)]:
                done.result()
        finally:
            # After damage nothing more is read: the next checkpoint is tried instead.
            pool.shutdown(cancel_futures=True)

    def _shape(self, key: str) -> tuple[int, ...] | None:
        return tuple(self._tensors[key]["shape"]) if key in self._tensors else None

    def _check_shapes(self, wanted: Mapping[str, Piece]) -> None:
        for key, piece in wanted.items():
            stored = self._shape(key)
            if stored != piece.shape:
                raise ConfigError(
                    f"{self.url} is of another network or objective: {key} has shape {stored}, "
                    f"this run needs {piece.shape}; set model and objective as they were, or "
                    "choose another run_dir"
                )

    def _parts_by_block(self, wanted: Mapping[str, Piece]) -> dict[tuple[str, int], list[_Part]]:
        """Return by (file, number of block) what of it belongs where, in its order."""
        blocks: dict[tuple[str, int], list[_Part]] = {}
        for key, piece in wanted.items():
            target, numel = piece.data.view(torch.uint8), piece.data.numel()
            found = 0
            for stored in self._tensors[key]["pieces"]:
                first = max(piece.offset, stored["offset"])
                last = min(piece.offset + numel, stored["offset"] + stored["numel"])
                if first >= last:
                    continue
                found += last - first
                part = target[ITEM_BYTES * (first - piece.offset) :][: ITEM_BYTES * (last - first)]
                start = stored["start_byte"] + ITEM_BYTES * (first - stored["offset"])
                # A part may begin and end in the middle of blocks.
                while len(part):
                    number, skip = divmod(start, self._block_bytes)
                    here, part = part.tensor_split([self._block_bytes - skip])
                    blocks.setdefault((stored["file"], number), []).append(_Part(skip, here))
                    start += len(here)
            if found != numel:
                raise DamagedCheckpointError(
                    f"{self.url} holds {found} of {numel} elements of {key}"
                )
        for parts in blocks.values():
            parts.sort(key=lambda part: part.start)
        return blocks

    def _read_block(self, name: str, number: int, parts: list[_Part], scratch: Tensor) -> None:
        """Read a block straight into the memory it belongs to, through `scratch` to a GPU's.

        What nobody wants of it is read, too: the hash is that of the whole block.
        """
        first = number * self._block_bytes
        num_bytes = min(self._block_bytes, self._files[name]["bytes"] - first)
        pieces: list[Tensor] = []
        end = 0
        for start, target in parts:
            here = target if target.is_cpu else scratch[start : start + len(target)]
            pieces += [scratch[end:start], here]
            end = start + len(target)
        buffers = [piece.numpy().data for piece in (*pieces, scratch[end:num_bytes]) if len(piece)]
        with self._reading(name):
            # Into the live tensors, hashed afterwards: 0.71 of the speed of reading and hashing
            # alone. Copies out of a buffer made it 0.44 (from the page cache, two threads).
            self._folder.read_into(name, first, buffers)
        digest = xxhash.xxh3_64()
        for buffer in buffers:
            digest.update(buffer)
        if digest.hexdigest() != self._files[name]["blocks"][number]:
            last = first + num_bytes
            raise DamagedCheckpointError(
                f"{self.url}: {name} is damaged in bytes {first} to {last}"
            )
        for start, target in parts:
            if not target.is_cpu:
                # Not `non_blocking`: the next block overwrites the scratch.
                target.copy_(scratch[start : start + len(target)])

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Tell a file that is missing from one that cannot be read now."""
        try:
            yield
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{self.url}: {name} is missing") from None
        except OSError as error:
            # Not damage: a server that is away must not send a run back to an older checkpoint.
            raise CheckpointError(f"{self.url}: {name} cannot be read: {error}") from None


@dataclass(frozen=True)
class LoadPlan:
    """The parts of a checkpoint that a resuming run takes."""

    reader: CheckpointReader
    fresh: Collection[str] = ()
    """Kinds of pieces that are not taken: they stay as they are."""
    changes: Sequence[str] = ()
    """Differences from the run that wrote the checkpoint, for people."""
