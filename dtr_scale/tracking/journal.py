"""Write a run's figures to journal.jsonl, one JSON object per logged step.

The journal comes before every other record: MLflow is sent what stands in it.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from dtr_scale.errors import DataError
from dtr_scale.storage.folder import open_folder

log = logging.getLogger(__name__)

Record = dict[str, float]

TIMINGS = {
    "samples_per_second", "tokens_per_second", "step_seconds", "data_wait_fraction",
    "checkpoint_stall_seconds", "slowest_rank", "slowest_rank_seconds", "median_rank_seconds",
    "gpu_hours", "memory_gb", "tflops", "mfu", "power_watts",
}  # fmt: skip
"""What a journal tells of time and machine: other figures are the same to the last bit."""


class Journal:
    """journal.jsonl of a run that goes on from `step`.

    Lines after that step, and a line that a kill cut off, are dropped. The run writes those steps
    again, so each stands in the journal once. If the disk is full, records stay in memory and are
    written when there is room.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        if path.exists():
            kept = [json.dumps(record) + "\n" for record in read_journal(path, last_step=step)]
            # Written whole beside it and renamed: a kill in between must not cost the journal.
            open_folder(path.parent).write_bytes(path.name, "".join(kept).encode())
        # Unbuffered: a record is the kernel's when `write` returns, and outlives kill -9.
        self._file = path.open("ab", buffering=0)
        self._unwritten = bytearray()
        self._failing = False

    def write(self, record: Record) -> None:
        self._unwritten += json.dumps(record).encode() + b"\n"
        try:
            self._write_all()
        except OSError as error:
            if not self._failing:
                log.warning(
                    "%s cannot be written, training goes on: %s; make room: its records are kept "
                    "in memory meanwhile",
                    self.path,
                    error.strerror,
                )
            self._failing = True
        else:
            if self._failing:
                log.info("%s is written again, and complete", self.path)
            self._failing = False

    def sync(self) -> None:
        """Make the records written so far survive a power cut; any thread may call it."""
        # By descriptors of its own: the loop may close the file meanwhile. The folder holds the
        # name of a journal that has just been made.
        for path in (self.path, self.path.parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def close(self) -> None:
        """Write what is left, sync and close, once; the OSError if that fails."""
        if self._file.closed:
            return
        with self._file:
            self._write_all()
            os.fsync(self._file.fileno())

    def _write_all(self) -> None:
        """Append what is unwritten. A disk that fills up takes a part; the next try the rest."""
        while self._unwritten:
            del self._unwritten[: self._file.write(self._unwritten)]


def read_journal(path: Path, *, last_step: int | None = None) -> Iterator[Record]:
    """Yield the journal's records up to `last_step`, without a line that a kill cut off."""
    records, _ = read_new_records(path, 0)
    for record in records:
        if last_step is None or record["step"] <= last_step:
            yield record


def last_step(path: Path) -> int:
    """Return the step of the journal's last whole record, 0 if there is none."""
    records = list(read_journal(path)) if path.exists() else []
    return int(records[-1]["step"]) if records else 0


def read_new_records(path: Path, start: int) -> tuple[list[Record], int]:
    """Return the whole records from byte `start` on, and the byte after them."""
    with path.open("rb") as file:
        file.seek(start)
        data = file.read()
    # The last line may be cut off, by a kill or because it is being written at this moment.
    end = data.rfind(b"\n") + 1
    try:
        return [json.loads(line) for line in data[:end].splitlines()], start + end
    except ValueError as error:
        raise DataError(
            f"{path} has a line that is not JSON ({error}); repair it or move it away"
        ) from None
