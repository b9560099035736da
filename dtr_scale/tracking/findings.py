"""Read what has been found about a run from its directory: evaluations and pictures."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dtr_scale.tracking.attempts import Attempt, counts, read_lines

EVALUATIONS, PICTURES = "evaluations.jsonl", "samples"
_OF_A_STEP = re.compile(r"step_(\d+)(?:_(\w+))?")
_MOST_BYTES = 64 * 2**20  # of an array beside a picture


@dataclass(frozen=True)
class Evaluation:
    """The numbers of one checkpoint, and the data that they were measured against."""

    step: int
    time: datetime
    metrics: Mapping[str, float]
    num_samples: int | None
    reference: tuple[str, str] | None
    """Name and digest."""


@dataclass(frozen=True)
class Picture:
    """A picture of the state after a step."""

    path: Path
    key: str
    """The chart that it belongs to."""
    step: int
    time_ms: int
    is_remade: bool
    """Whether its file is written anew by each command, rather than once for each step."""


def read_evaluations(run_dir: Path, attempts: Sequence[Attempt]) -> list[Evaluation]:
    """Return the evaluations that belong to the run, as it has gone on since."""
    found = []
    for line in read_lines(run_dir / EVALUATIONS):
        try:
            manifest = line["manifest"]
            time = datetime.fromisoformat(line["time"])
            evaluation = Evaluation(
                int(manifest["step"]),
                time if time.tzinfo else time.replace(tzinfo=UTC),
                {key: float(value) for key, value in line["metrics"].items()},
                manifest.get("num_samples"),
                _reference(manifest.get("reference")),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            continue
        if counts(evaluation.step, evaluation.time, attempts):
            found.append(evaluation)
    return found


def read_pictures(run_dir: Path, attempts: Sequence[Attempt], last_step: int) -> list[Picture]:
    """Return the pictures that belong to the run; of one that tells no step, `last_step`."""
    return [
        picture
        for path in sorted((run_dir / PICTURES).glob("*.png"))
        if (picture := _picture(path, last_step))
        and counts(picture.step, datetime.fromtimestamp(picture.time_ms / 1000, UTC), attempts)
    ]


def _picture(path: Path, last_step: int) -> Picture | None:
    try:
        time_ms = int(path.stat().st_mtime * 1000)
    except OSError:  # replaced at this moment
        return None
    if match := _OF_A_STEP.fullmatch(path.stem):
        # What has a kind was made by a command, which may make it again.
        key, is_remade = match[2] or PICTURES, match[2] is not None
        return Picture(path, key, int(match[1]), time_ms, is_remade)
    step = _manifest_of(path).get("step", last_step)
    key = re.sub(r"[^A-Za-z0-9_\-. ]", "_", path.stem)
    return Picture(path, key, step if isinstance(step, int) else last_step, time_ms, is_remade=True)


def arrays_of(picture: Picture) -> Path | None:
    """Return the numbers that a picture shows, an .npz beside it, where they are few."""
    path = picture.path.with_suffix(".npz")
    return path if path.is_file() and path.stat().st_size < _MOST_BYTES else None


def _manifest_of(path: Path) -> dict[str, Any]:
    """Return the manifest of a picture, from the .json or .npz beside it; {} if there is none."""
    import numpy as np

    try:
        if (beside := path.with_suffix(".json")).exists():
            found = json.loads(beside.read_bytes())
            found = found.get("manifest", found)
        else:
            with np.load(path.with_suffix(".npz")) as arrays:
                found = json.loads(str(arrays["manifest"]))
    except (OSError, ValueError, KeyError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _reference(told: Any) -> tuple[str, str] | None:  # noqa: ANN401
    """Return name and digest of the first reference of a manifest, None if it names none."""
    for record in _records(told):
        digest = record.get("manifest_hash") or record.get("sha256")
        if isinstance(digest, str) and digest:
            source = str(record.get("source") or record.get("split") or "reference")
            return source.rstrip("/").rpartition("/")[2] or source, digest
    return None


def _records(told: Any) -> Iterator[Mapping[str, Any]]:  # noqa: ANN401
    """Yield an object and the objects in it."""
    if isinstance(told, Mapping):
        yield told
        for value in told.values():
            yield from _records(value)
