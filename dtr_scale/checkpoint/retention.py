"""Which checkpoints stay: the newest, every n-th, and the best by a metric."""

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

from dtr_scale.storage import Folder

METRICS = "metrics.json"


class Metrics:
    """Figures by step, kept in metrics.json next to the checkpoints for the runs to come.

    The loop notes and the thread that saves reads, so both take the lock.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._by_step: dict[int, dict[str, float]] | None = None

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        with self._lock:
            self._load().setdefault(step, {}).update(figures)
            self._store()

    def keep(self, steps: Sequence[int]) -> None:
        """Forget all but these steps."""
        with self._lock:
            known = self._load()
            self._by_step = {step: known[step] for step in known if step in steps}
            if len(self._by_step) < len(known):
                self._store()

    def best_first(self, name: str) -> list[int]:
        """Return the steps that have a value of the metric `name`, the lowest first."""
        with self._lock:
            values = {s: figures.get(name, math.nan) for s, figures in self._load().items()}
        return sorted((s for s, v in values.items() if math.isfinite(v)), key=lambda s: values[s])

    def _load(self) -> dict[int, dict[str, float]]:
        if self._by_step is None:
            try:
                stored = self._folder.read_json(METRICS)
            except (FileNotFoundError, ValueError):
                stored = {}
            self._by_step = {int(step): figures for step, figures in stored.items()}
        return self._by_step

    def _store(self) -> None:
        content = json.dumps({str(s): f for s, f in sorted(self._load().items())}, indent=1)
        self._folder.write_bytes(METRICS, content.encode())


def superfluous(
    steps: Sequence[int],
    *,
    is_complete: Callable[[int], bool],
    keep_last: int,
    keep_every: int,
    best: Sequence[int],
    keep_best: int,
) -> list[int]:
    """Return which of `steps` (newest first) may go.

    `best` are steps, the best first. What is not complete takes nobody's place: without
    `keep_last` complete ones nothing goes, so one always stays.
    """
    last = list(islice(filter(is_complete, steps), keep_last))
    if len(last) < keep_last:
        return []
    kept = set(islice((step for step in best if step in steps and is_complete(step)), keep_best))
    return [
        step
        for step in steps
        if step < last[-1] and step not in kept and not (keep_every and step % keep_every == 0)
    ]
