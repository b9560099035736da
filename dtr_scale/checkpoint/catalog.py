"""The checkpoints of a run as folders: how one appears, counts, and goes.

A checkpoint under its final name is complete: it is written to a temporary folder, synced, marked
and renamed. Object storage cannot rename, so there the mark is the last object, and UNFINISHED
tells a save that was cut off from a checkpoint that was damaged later.
"""

import re
from typing import Any

from dtr_scale.checkpoint.layout import COMPLETE, INDEX, build_index, complete_mark
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.errors import CheckpointError, DamagedCheckpointError
from dtr_scale.storage.folder import Folder

UNFINISHED = "UNFINISHED"
_STEP_NAME = re.compile(r"step_(\d{8,})")


class Catalog:
    """The checkpoints in one folder, local or s3://, as one process sees them.

    Raises OSError, and CheckpointError where that is more to the point.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def url(self, step: int) -> str:
        return self.folder.child(_name(step)).url

    def reader(self, step: int) -> CheckpointReader:
        return CheckpointReader(self.folder.child(_name(step)))

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first; saves cut off do not count."""
        try:
            names = self.folder.names()
        except OSError as error:
            raise CheckpointError(f"cannot list {self.folder.url}: {error}") from None
        matches = [match for name in names if (match := _STEP_NAME.fullmatch(name))]
        steps = sorted((int(match[1]) for match in matches), reverse=True)
        return [step for step in steps if not self._is_unfinished(_name(step))]

    def is_complete(self, step: int) -> bool:
        """Tell whether mark, index and file sizes fit: cheap, and all but altered bytes shows."""
        try:
            self.reader(step).check_sizes()
        except DamagedCheckpointError:
            return False
        return True

    def begin(self, step: int) -> Folder:
        """Return the empty folder that ranks write the checkpoint of `step` to.

        What saves and removals that were cut off have left makes room first.
        """
        for name in self.folder.names():
            if name.startswith(".step_") or self._is_unfinished(name):
                self.folder.remove(name)
        target = self.target(step)
        self.folder.remove(_last_part(target))
        if not target.is_local:
            target.write_bytes(UNFINISHED, b"")
        return target

    def target(self, step: int) -> Folder:
        name = _name(step)
        return self.folder.child(f".{name}.tmp" if self.folder.is_local else name)

    def commit(self, step: int, entries: list[dict[str, Any]], meta: dict[str, Any]) -> None:
        """Make the checkpoint that ranks have written appear under its final name."""
        target = self.target(step)
        self._check_sizes(target, entries)
        index = build_index(entries, meta)
        target.write_bytes(INDEX, index)
        target.write_bytes(COMPLETE, complete_mark(index))
        target.fsync()
        if self.folder.is_local:
            # A damaged checkpoint of the same step, passed over at the start, makes room.
            self.discard(step)
            self.folder.rename(_last_part(target), _name(step))
            self.folder.fsync()
        else:
            target.remove(UNFINISHED)

    def abandon(self, step: int) -> None:
        """Give back at once what a failed save has taken of a disk that may be full."""
        if self.folder.is_local:
            self.folder.remove(_last_part(self.target(step)))

    def discard(self, step: int) -> None:
        """Remove a checkpoint so that a kill in between leaves no half of it."""
        name = _name(step)
        if self.folder.is_local and self.folder.exists(name):
            self.folder.remove(f".{name}.old")
            self.folder.rename(name, f".{name}.old")
            name = f".{name}.old"
        self.folder.remove(name)

    def _check_sizes(self, target: Folder, entries: list[dict[str, Any]]) -> None:
        """Refuse to commit what rank 0 does not see: folders of that name on several nodes."""
        for entry in entries:
            if not target.exists(entry["file"]) or target.size(entry["file"]) != entry["bytes"]:
                raise CheckpointError(
                    f"{target.url}/{entry['file']}, written by another rank, is not what rank 0 "
                    "finds there; give a checkpoint.dir that all nodes share, or s3://"
                )

    def _is_unfinished(self, name: str) -> bool:
        if self.folder.is_local or not _STEP_NAME.fullmatch(name):
            return False
        children = self.folder.child(name).names()
        return UNFINISHED in children and COMPLETE not in children


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _last_part(folder: Folder) -> str:
    return folder.url.rpartition("/")[2]
