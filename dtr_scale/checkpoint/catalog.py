"""List, commit and remove the checkpoints of a run, each a folder `step_*`.

A checkpoint is staged, filled by all ranks, and published with COMPLETE as its last file. What a
save that was cut off leaves was never published, and does not count; what was published and is
not whole any more is a damaged checkpoint.
"""

from typing import Any

from dtr_scale.checkpoint.layout import (
    COMPLETE,
    INDEX,
    build_index,
    complete_mark,
    published_steps,
    step_name,
)
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.errors import CheckpointError, DamagedCheckpointError
from dtr_scale.storage.folder import Folder


class Catalog:
    """The checkpoints in one folder, local or s3://, as one process sees them.

    Raises OSError, and CheckpointError where that is more to the point.
    """

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def at(self, step: int) -> Folder:
        """Return where the checkpoint of `step` is, or would be."""
        return self.folder.child(step_name(step))

    def url(self, step: int) -> str:
        return self.at(step).url

    def reader(self, step: int) -> CheckpointReader:
        return CheckpointReader(self.at(step))

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, newest first; saves cut off do not count."""
        try:
            return published_steps(self.folder)
        except OSError as error:
            raise CheckpointError(f"cannot list {self.folder.url}: {error}") from None

    def is_complete(self, step: int) -> bool:
        """Tell whether mark, index and file sizes fit: cheap, and all but altered bytes shows."""
        try:
            self.reader(step).check_sizes()
        except DamagedCheckpointError:
            return False
        return True

    def begin(self, step: int) -> None:
        """Make room for the checkpoint of `step`, also of what kills have left."""
        for name in self.folder.names():
            # What is staged on a disk is named `.step_*.tmp`.
            if "step_" in name and not self.folder.is_published(name, COMPLETE):
                self.folder.remove(name)
        self.folder.stage(step_name(step))

    def target(self, step: int) -> Folder:
        """Return the folder that ranks write the checkpoint of `step` to."""
        return self.folder.staged(step_name(step))

    def commit(self, step: int, entries: list[dict[str, Any]], meta: dict[str, Any]) -> None:
        """Make the checkpoint that ranks have written count."""
        target = self.target(step)
        self._check_sizes(target, entries)
        index = build_index(entries, meta)
        # COMPLETE last: a power cut before it leaves no checkpoint, never one without an index.
        target.write_bytes(INDEX, index)
        self.folder.publish(step_name(step), COMPLETE, complete_mark(index))

    def abandon(self, step: int) -> None:
        """Give back at once what a failed save has taken of a disk that may be full."""
        self.folder.unstage(step_name(step))

    def discard(self, step: int) -> None:
        """Remove a checkpoint."""
        self.folder.discard(step_name(step))

    def _check_sizes(self, target: Folder, entries: list[dict[str, Any]]) -> None:
        """Refuse to commit what rank 0 does not see: folders of that name on several nodes."""
        for entry in entries:
            if not target.exists(entry["file"]) or target.size(entry["file"]) != entry["bytes"]:
                raise CheckpointError(
                    f"{target.url}/{entry['file']}, written by another rank, is not what rank 0 "
                    "finds there; give a checkpoint.dir that all nodes share, or s3://"
                )
