"""The run's own record, one JSON object per logged step: it is written before anything else."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dtr_scale.errors import DataError
from dtr_scale.storage import Folder

Record = dict[str, float]


class Journal:
    """journal.jsonl of a run that stands at `step`.

    Lines after that step, and a line cut off by a kill, are dropped: the run will write them
    again, so each step stands in the journal once.
    """

    def __init__(self, path: Path, *, step: int) -> None:
        self.path = path
        if path.exists():
            kept = [json.dumps(record) + "\n" for record in read_journal(path, last_step=step)]
            Folder(path.parent).write_bytes(path.name, "".join(kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


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
    end = data.rfind(b"\n") + 1
    try:
        return [json.loads(line) for line in data[:end].splitlines()], start + end
    except ValueError as error:
        raise DataError(
            f"{path} has a line that is not JSON ({error}); repair it or move it away"
        ) from None
