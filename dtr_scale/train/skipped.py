"""Keep which steps were skipped and what they were made of, in skipped.jsonl of the run."""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.attempts import read_lines

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkippedStep:
    """A step whose update was not made."""

    step: int
    salt: int
    """That of its draws: how often the run had gone back before."""
    loss: float
    mse: float
    grad_norm: float
    limits: tuple[float, float]
    """What mse and gradient norm had to be below."""
    in_a_row: int
    samples: Sequence[tuple[str | int, int]]
    """(shard, index in it) of the global batch."""

    def __str__(self) -> str:
        limits = (
            "" if math.inf in self.limits else " (limits {:.4g} and {:.4g})".format(*self.limits)
        )
        return (
            f"step {self.step}: loss {self.loss:.4g}, mse {self.mse:.4g}, gradient norm "
            f"{self.grad_norm:.4g}{limits}: the update is skipped, {self.in_a_row} in a row"
        )


class SkipLog:
    """skipped.jsonl of a run that goes on from `step` with draws of `salt`.

    Lines of later steps go, since the run makes them again; those of ways that were given up, whose
    salt is lower, stay.
    """

    def __init__(self, path: Path, *, step: int, salt: int) -> None:
        self._path = path
        if path.exists():
            # Without a line that a kill has cut off.
            kept = [entry for entry in read_lines(path) if _stays(entry, step, salt)]
            lines = "".join(json.dumps(entry) + "\n" for entry in kept)
            open_folder(path.parent).write_bytes(path.name, lines.encode())

    def write(self, step: SkippedStep) -> None:
        log.warning("%s", step)
        try:
            # Opened for each: most runs have none.
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(step)) + "\n")
        except OSError as error:  # it is told of the run, and not worth it
            log.warning("%s cannot be written: %s", self._path, error.strerror)


def _stays(entry: dict[str, Any], step: int, salt: int) -> bool:
    return entry["step"] <= step or entry["salt"] < salt
