"""Define the interface of a tracker, which mirrors a run's journal and its evaluations."""

from abc import ABC, abstractmethod
from pathlib import Path

from dtr_scale.tracking.journal import Record


class Tracker(ABC):
    """A mirror of the journal. No method blocks training or raises because a server is away."""

    @abstractmethod
    def log(self, record: Record) -> None:
        """Take note that `record` was written to the journal."""

    @abstractmethod
    def log_evaluation(self, step: int, metrics: Record, picture: Path) -> None:
        """Show what was measured and sampled at a step."""

    @abstractmethod
    def finish(self, outcome: str, checkpoint_url: str | None) -> None:
        """Bring the mirror up to date, within reason, and close it."""


class NullTracker(Tracker):
    """Tracks nothing: `tracking.type = none`, and every rank but the first."""

    def log(self, record: Record) -> None: ...

    def log_evaluation(self, step: int, metrics: Record, picture: Path) -> None: ...

    def finish(self, outcome: str, checkpoint_url: str | None) -> None: ...
