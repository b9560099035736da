"""Define the interface of a tracker, which mirrors what a run writes to its directory."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from dtr_scale.tracking.journal import Record


class Tracker(ABC):
    """A mirror of a run directory. No method blocks training or raises if a server is away."""

    @abstractmethod
    def log(self, record: Record) -> None:
        """Take note that `record` was written to the journal."""

    @abstractmethod
    def look(self) -> None:
        """Take note that there is something else: a checkpoint, an evaluation, a picture."""

    @abstractmethod
    def finish(self) -> None:
        """Bring the mirror up to date, within reason, and close it."""


class NullTracker(Tracker):
    """Tracks nothing: `tracking.type = none`, and every rank but the first."""

    def log(self, record: Record) -> None: ...

    def look(self) -> None: ...

    def finish(self) -> None: ...


class Trackers(Tracker):
    """Several mirrors of a run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, record: Record) -> None:
        for tracker in self._trackers:
            tracker.log(record)

    def look(self) -> None:
        for tracker in self._trackers:
            tracker.look()

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
