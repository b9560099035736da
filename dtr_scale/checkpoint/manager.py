"""Saving, finding, restoring and retiring the checkpoints of a run.

A checkpoint under its final name is complete: it is written to a temporary folder, synced, marked
and renamed. Object storage cannot rename, so there the mark is the last object, and UNFINISHED
tells a save that was cut off from a checkpoint that was damaged later.
"""

import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtr_scale.checkpoint.layout import (
    COMPLETE,
    INDEX,
    CheckpointReader,
    Piece,
    build_index,
    complete_mark,
    write_rank_file,
)
from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError, DamagedCheckpointError
from dtr_scale.storage import Folder

log = logging.getLogger(__name__)

UNFINISHED = "UNFINISHED"
_PROBE = ".probe"
_STEP_NAME = re.compile(r"step_(\d{8,})")


class CheckpointManager:
    """The checkpoints in one folder, local or s3://, as all ranks of a run see them."""

    def __init__(self, folder: Folder, *, world: World, keep_last: int, keep_every: int) -> None:
        self._folder = folder
        self._world = world
        self._keep_last = keep_last
        self._keep_every = keep_every

    def url(self, step: int) -> str:
        return self._folder.child(_name(step)).url

    def probe(self) -> None:
        """Check that this folder can be written and that every rank sees the same one.

        Every rank calls it; CheckpointError on all of them otherwise.
        """
        with self._world.agree(), _as_checkpoint_error(self._folder.url):
            if self._world.is_main:
                self._folder.write_bytes(_PROBE, b"")
        with self._world.agree(), _as_checkpoint_error(self._folder.url):
            if not self._folder.exists(_PROBE):
                raise CheckpointError(
                    f"rank {self._world.rank} does not see what rank 0 writes in "
                    f"{self._folder.url}; give a checkpoint.dir that all nodes share, or s3://"
                )
        with self._world.agree(), _as_checkpoint_error(self._folder.url):
            if self._world.is_main:
                self._folder.remove(_PROBE)

    def save(self, step: int, state: Mapping[str, Piece], meta: dict[str, Any]) -> str:
        """Store all ranks' pieces as the checkpoint of `step`; return its URL.

        Every rank calls it. Raises CheckpointError on all ranks if one fails; then nothing
        carries the final name.
        """
        mine = self._share(state)
        target = _name(step) if not self._folder.is_local else f".{_name(step)}.tmp"
        with self._world.agree(), _as_checkpoint_error(self.url(step)):
            if self._world.is_main:
                self._folder.remove(target)
                if not self._folder.is_local:
                    self._folder.write_bytes(f"{target}/{UNFINISHED}", b"")
        entry: dict[str, Any] = {}
        with self._world.agree(), _as_checkpoint_error(self.url(step)):
            entry = self._write_part(target, mine)
        entries = self._world.all_gather_object(entry)
        with self._world.agree(), _as_checkpoint_error(self.url(step)):
            if self._world.is_main:
                self._check_sizes(target, entries)
                self._commit(step, target, build_index(entries, meta))
        if self._world.is_main:
            self._retire(step)
        return self.url(step)

    def restore(self, state: Mapping[str, Piece]) -> dict[str, Any] | None:
        """Copy the newest complete checkpoint into `state`'s pieces; return its meta.

        Every rank calls it and gets the same verdict. Damaged checkpoints are named and passed
        over. None if there is no checkpoint at all; CheckpointError if there are some and none
        can be used.
        """
        steps: list[int] = []
        with self._world.agree():
            if self._world.is_main:
                steps = self.steps()
        steps = self._world.broadcast_object(steps)
        for step in steps:
            try:
                with self._world.agree():
                    reader = CheckpointReader(self._folder.child(_name(step)))
                    values = reader.read_into(state)
            except DamagedCheckpointError as error:
                if self._world.is_main:
                    log.warning("checkpoint passed over: %s", error)
                continue
            for key, piece in state.items():
                piece.data.copy_(values[key])
            return reader.meta
        if steps:
            raise CheckpointError(
                f"none of the {len(steps)} checkpoints in {self._folder.url} is complete; restore "
                "one from a copy, or start afresh on purpose with --checkpoint.resume=never"
            )
        return None

    def newest(self) -> CheckpointReader:
        """Return the newest complete checkpoint for reading; CheckpointError if there is none."""
        for step in self.steps():
            try:
                return CheckpointReader(self._folder.child(_name(step)))
            except DamagedCheckpointError as error:
                log.warning("checkpoint passed over: %s", error)
        raise CheckpointError(f"no complete checkpoint in {self._folder.url}; train first")

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first; saves cut off do not count."""
        try:
            names = self._folder.names()
        except OSError as error:
            raise CheckpointError(f"cannot list {self._folder.url}: {error}") from None
        matches = [match for name in names if (match := _STEP_NAME.fullmatch(name))]
        steps = sorted((int(match[1]) for match in matches), reverse=True)
        return [step for step in steps if not self._is_unfinished(_name(step))]

    def _is_unfinished(self, name: str) -> bool:
        if self._folder.is_local or not _STEP_NAME.fullmatch(name):
            return False
        children = self._folder.child(name).names()
        return UNFINISHED in children and COMPLETE not in children

    def _share(self, state: Mapping[str, Piece]) -> dict[str, Piece]:
        """Return the pieces that this rank stores: each piece once, replicas spread over ranks."""
        sizes = {(key, piece.offset): piece.data.numel() for key, piece in state.items()}
        load = [0] * self._world.world_size
        owner: dict[tuple[str, int], int] = {}
        everyone = self._world.all_gather_object(sizes)
        for place in dict.fromkeys(place for held in everyone for place in held):
            holders = [rank for rank, held in enumerate(everyone) if place in held]
            owner[place] = min(holders, key=lambda rank: load[rank])
            load[owner[place]] += everyone[owner[place]][place]
        rank = self._world.rank
        return {key: piece for key, piece in state.items() if owner[key, piece.offset] == rank}

    def _write_part(self, target: str, pieces: Mapping[str, Piece]) -> dict[str, Any]:
        name = f"rank_{self._world.rank:05d}.safetensors"
        if self._folder.is_local:
            path = self._folder.child(target).local_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            entry = write_rank_file(path, pieces)
            _fsync(path)
            return entry
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / name
            entry = write_rank_file(path, pieces)
            self._folder.put(path, f"{target}/{name}")
            return entry

    def _commit(self, step: int, target: str, index: bytes) -> None:
        """Make the checkpoint appear under its final name."""
        temporary = self._folder.child(target)
        temporary.write_bytes(INDEX, index)
        temporary.write_bytes(COMPLETE, complete_mark(index))
        temporary.fsync()
        if self._folder.is_local:
            # A damaged checkpoint of the same step, passed over at the start, makes room.
            self._discard(_name(step))
            self._folder.rename(target, _name(step))
            self._folder.fsync()
        else:
            temporary.remove(UNFINISHED)

    def _check_sizes(self, target: str, entries: list[dict[str, Any]]) -> None:
        """Refuse to commit what rank 0 does not see: folders of that name on several nodes."""
        folder = self._folder.child(target)
        for entry in entries:
            if not folder.exists(entry["file"]) or folder.size(entry["file"]) != entry["bytes"]:
                raise CheckpointError(
                    f"{folder.url}/{entry['file']}, written by another rank, is not what rank 0 "
                    "finds there; give a checkpoint.dir that all nodes share, or s3://"
                )

    def _retire(self, step: int) -> None:
        """Remove what the checkpoint of `step` makes superfluous; training goes on if it fails."""
        try:
            for name in self._folder.names():
                if name.startswith(".step_") or self._is_unfinished(name):
                    self._folder.remove(name)  # left by a save or a removal that was cut off
            # Damaged ones that were passed over may be newer; they do not count.
            complete = [old for old in self.steps() if old <= step and self._is_complete(old)]
            for old in complete[self._keep_last :]:
                if not self._keep_every or old % self._keep_every:
                    self._discard(_name(old))
        except OSError as error:
            log.warning("old checkpoints stay in %s: %s", self._folder.url, error)

    def _is_complete(self, step: int) -> bool:
        return self._folder.exists(f"{_name(step)}/{COMPLETE}")

    def _discard(self, name: str) -> None:
        """Remove a checkpoint so that a kill in between leaves no half of it."""
        if self._folder.is_local and self._folder.exists(name):
            self._folder.remove(f".{name}.old")
            self._folder.rename(name, f".{name}.old")
            name = f".{name}.old"
        self._folder.remove(name)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _as_checkpoint_error(url: str) -> Iterator[None]:
    """Turn what the disk or the object store raises into a CheckpointError naming the place."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"cannot save {url}: {error}; make room or give another checkpoint.dir"
        ) from error
