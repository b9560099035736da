"""Tag the best of a run's checkpoints by the number of its evaluations."""

import json
import math
import threading
from collections.abc import Callable, Collection
from typing import NamedTuple

from dtr_scale.storage.folder import Folder

BEST = "best.json"


class Best(NamedTuple):
    """The tag: which checkpoint, by which number."""

    step: int
    metric: str
    value: float


class BestTag:
    """best.json beside the checkpoints: the number of each that is kept, and which is the lowest.

    The training loop ranks evaluations while the thread that saves removes checkpoints, so both
    take the lock. Raises OSError where the folder does; a file that is damaged counts as none.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._metric, self._settings = "", ""
        self._values: dict[int, float] | None = None

    def rank(self, step: int, value: float, metric: str, settings: str) -> None:
        """Take the number of the checkpoint of `step`, which may still be being saved.

        Numbers of other `settings` say nothing about this one, and are forgotten.
        """
        with self._lock:
            values = self._load()
            if (metric, settings) != (self._metric, self._settings):
                self._metric, self._settings = metric, settings
                values.clear()
            values.pop(step, None)
            if math.isfinite(value):
                values[step] = value
            self._store()

    def keep(self, steps: Collection[int]) -> None:
        """Forget the numbers of all but these steps."""
        with self._lock:
            values = self._load()
            gone = [step for step in values if step not in steps]
            for step in gone:
                del values[step]
            if gone:
                self._store()

    def best(self, is_there: Callable[[int], bool] = lambda step: True) -> Best | None:
        """Return the best of the checkpoints that are there."""
        with self._lock:
            values = dict(self._load())
            # The earliest of equals.
            ordered = sorted(values, key=lambda step: (values[step], step))
            metric = self._metric
        # Without the lock: it asks storage, and the training loop may be waiting to rank.
        step = next(filter(is_there, ordered), None)
        return None if step is None else Best(step, metric, values[step])

    def _load(self) -> dict[int, float]:
        # Read once: this job holds the folder, and nobody else writes there.
        if self._values is None:
            self._values = {}
            try:
                stored = self._folder.read_json(BEST)
                values = {int(step): float(value) for step, value in stored["values"].items()}
                self._metric, self._settings = str(stored["metric"]), str(stored["settings"])
                self._values = values
            except FileNotFoundError:
                pass
            except (ValueError, TypeError, KeyError, AttributeError):
                pass  # the next evaluation writes it anew
        return self._values

    def _store(self) -> None:
        values = self._load()
        content = {
            # For whoever reads the file; the checkpoint may have been removed by hand.
            "step": min(values, key=lambda step: (values[step], step), default=None),
            "metric": self._metric,
            "settings": self._settings,
            "values": {str(step): value for step, value in sorted(values.items())},
        }
        self._folder.write_bytes(BEST, json.dumps(content, indent=1).encode())
