"""Keep the finished batches of an evaluation on disk, for the job that goes on with it."""

import io
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from dtr_scale.storage.folder import open_folder

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

_PREFIX = ".step_"  # hidden: whoever lists the grids sees none of it
_PLAN = "plan.json"


class KeptBatches:
    """The batches of one step's evaluation, by number, in memory and in a folder.

    `plan` is all that they depend on besides the step: those of another plan do not count. A disk
    that fails costs the next job time, never this one its evaluation. Without a folder they are in
    memory alone.
    """

    def __init__(self, folder: Path | None, step: int, plan: dict[str, Any]) -> None:
        self.batches: dict[int, Arrays] = {}
        self.num_added = 0
        """By this job; others were kept by an earlier one."""
        self._path = folder / f"{_PREFIX}{step:08d}" if folder else None
        self._plan = json.dumps(plan, sort_keys=True).encode()

    @property
    def exist(self) -> bool:
        """Whether a job was killed or left before it finished this evaluation."""
        return self._path is not None and self._path.is_dir()

    def load(self) -> None:
        """Read what earlier jobs have finished."""
        if self._path is None:
            return None
        try:
            if (self._path / _PLAN).read_bytes() != self._plan:
                return self.remove()
            for path in self._path.glob("*.npz"):
                with np.load(path) as stored:
                    self.batches[int(path.stem)] = {name: stored[name] for name in stored.files}
        except FileNotFoundError:
            pass
        except Exception as error:  # whatever it is, drawing again is better
            log.warning("%s cannot be used, its batches are drawn again: %s", self._path, error)
            self.remove()

    def add(self, number: int, arrays: Arrays) -> None:
        """Take a finished batch."""
        self.batches[number] = arrays
        self.num_added += 1
        if self._path is None:
            return
        file = io.BytesIO()
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            folder = open_folder(self._path)
            if not (self._path / _PLAN).exists():
                folder.write_bytes(_PLAN, self._plan)
            folder.write_bytes(f"{number}.npz", file.getbuffer())
        except OSError as error:
            log.warning("%s: batches are not kept for the next start: %s", self._path, error)
            shutil.rmtree(self._path, ignore_errors=True)  # it may be the disk that is full
            self._path = None

    def joined(self) -> Arrays:
        """Return the arrays of all batches, in the order of their numbers, one after the other."""
        ordered = [self.batches[number] for number in sorted(self.batches)]
        names = {name: None for arrays in ordered for name in arrays}
        return {
            name: np.concatenate([arrays[name] for arrays in ordered if name in arrays])
            for name in names
        }

    def remove(self) -> None:
        """Forget everything, on disk too."""
        self.batches.clear()
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)


def remove_others(folder: Path, step: int) -> None:
    """Remove the kept batches of other steps: nobody goes on with them."""
    for path in folder.glob(f"{_PREFIX}*"):
        if path.name != f"{_PREFIX}{step:08d}":
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)  # a file of an earlier version
