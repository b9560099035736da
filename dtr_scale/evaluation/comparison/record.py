"""Hold what a run has recorded: settings, journal, evaluations and pictures of samples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

AXES = {
    "step": "steps",
    "samples_seen": "samples seen",
    "gpu_hours": "GPU hours (hours x ranks)",
}
"""What a curve can be drawn against, and how it is named."""

LOSS = "loss_mean"

UNKNOWN = "manifest unknown"
"""The one key of a manifest where only numbers are known; its value tells the run, so that it is
equal to that of no other run."""

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """Numbers of one checkpoint, with all they depend on."""

    step: int | None
    time: str
    metrics: Mapping[str, float]
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """A run as it stands on disk or on a server, finished or not."""

    name: str
    place: str
    """The run directory, or the id of an MLflow run."""
    settings: Mapping[str, Any]
    """By dotted key: "train.lr"."""
    journal: Columns
    """float64 [n] by key, of n logged steps; nan where a step has no such figure."""
    outcome: str = ""
    """running, finished, preempted or failed."""
    evaluations: Sequence[Evaluation] = ()
    """In the order of their steps, then of their time."""
    grids: Mapping[int, Callable[[], bytes]] = field(default_factory=dict)
    """What reads the picture of the samples of a step."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of its newest checkpoint: world_size, manifest_hash, num_parameters; what is not known is
    not there."""

    @property
    def step(self) -> int:
        """The last step of the journal."""
        return int(self.journal["step"][-1])

    @property
    def max_steps(self) -> int:
        return int(self.settings.get("train.max_steps") or self.step)

    def column(self, key: str) -> np.ndarray | None:
        """Return a figure of the journal, or one of AXES; None if there is none.

        LOSS is a step's own loss where a record tells no mean of the steps before.
        """
        if key == LOSS:
            return self._losses
        return self._axes.get(key, self.journal.get(key))

    def at(self, axis: str, steps: np.ndarray) -> np.ndarray | None:
        """Return where steps lie on one of AXES; None if that axis is not known."""
        column = self.column(axis)
        return None if column is None else np.interp(steps, self.journal["step"], column)

    @cached_property
    def _losses(self) -> np.ndarray | None:
        means, own = self.journal.get(LOSS), self.journal.get("loss")
        if means is None or own is None:
            return own if means is None else means
        return np.where(np.isfinite(means), means, own)

    @cached_property
    def _axes(self) -> Columns:
        axes = {"step": self.journal["step"]}
        for key in ("samples_seen", "gpu_hours"):
            if key in self.journal and (filled := _filled(axes["step"], self.journal[key])).size:
                axes[key] = filled
        if "gpu_hours" not in axes and (hours := self._gpu_hours(axes)) is not None:
            axes["gpu_hours"] = hours
        return axes

    def _gpu_hours(self, axes: Columns) -> np.ndarray | None:
        """Return hours x ranks at each record, by the throughput since the record before."""
        speed, ranks = self.journal.get("samples_per_second"), self.facts.get("world_size")
        if "samples_seen" not in axes or speed is None or not ranks:
            return None
        # A record of an evaluation alone tells no speed: its samples have been counted before.
        samples = np.diff(axes["samples_seen"], prepend=0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            seconds = np.where(samples > 0, samples / speed, 0.0)
        return np.cumsum(np.nan_to_num(seconds, posinf=0.0)) * float(ranks) / 3600


def letters(count: int) -> list[str]:
    """Return the short names of runs in tables and curves: A, B, C, ..."""
    return [chr(ord("A") + index) for index in range(count)]


def as_columns(records: Sequence[Mapping[str, float]]) -> Columns:
    """Return records as float64 arrays by key, nan where a record lacks the key."""
    columns: Columns = {}
    for row, record in enumerate(records):
        for key, value in record.items():
            if key not in columns:
                columns[key] = np.full(len(records), np.nan)
            columns[key][row] = value
    return columns


def _filled(steps: np.ndarray, values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    return np.interp(steps, steps[known], values[known]) if known.any() else values[:0]
