"""Which checkpoints stay: the newest, every n-th, and the best by a metric."""

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from dtr_scale.checkpoint.catalog import Catalog
from dtr_scale.errors import CheckpointError
from dtr_scale.storage.folder import Folder

log = logging.getLogger(__name__)

METRICS = "metrics.json"


@dataclass(frozen=True)
class Keep:
    """How many stay: the `last` ones, those of `every` n-th step, and the `best` by `metric`.

    Less is better; 0 stands for none.
    """

    last: int = 3
    every: int = 0
    best: int = 0
    metric: str = "loss"


class Retention:
    """Applies a `Keep` to a run's checkpoints, on rank 0. No failure here is worth the run."""

    def __init__(self, catalog: Catalog, keep: Keep) -> None:
        self._catalog = catalog
        self._keep = keep
        self._metrics = Metrics(catalog.folder)

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Remember what the checkpoint of `step` was measured at."""
        try:
            if self._keep.best:
                self._metrics.note(step, figures)
        except OSError as error:
            log.warning("figures of step %d are not kept: %s", step, error)

    def retire(self, step: int) -> None:
        """Remove what the checkpoint of `step` makes superfluous."""
        keep = self._keep
        try:
            # Damaged ones that were passed over may be newer; they do not count.
            steps = [old for old in self._catalog.steps() if old <= step]
            best_first = self._metrics.best_first(keep.metric) if keep.best else []
            gone = superfluous(
                steps, keep, best_first=best_first, is_complete=self._catalog.is_complete
            )
            if gone and keep.best and not best_first:
                log.warning(
                    "checkpoint.best_metric = %r was noted for no checkpoint so far, none is kept "
                    "for it; noted are %s",
                    keep.metric,
                    ", ".join(self._metrics.names()),
                )
            for old in gone:
                self._catalog.discard(old)
            if keep.best:
                self._metrics.keep(self._catalog.steps())
        except (OSError, CheckpointError) as error:
            log.warning("old checkpoints stay in %s: %s", self._catalog.folder.url, error)


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

    def names(self) -> list[str]:
        with self._lock:
            return sorted({name for figures in self._load().values() for name in figures})

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
    keep: Keep,
    *,
    best_first: Sequence[int],
    is_complete: Callable[[int], bool],
) -> list[int]:
    """Return which of `steps` (newest first) may go.

    What is not complete takes nobody's place: without `keep.last` complete ones nothing goes, so
    one always stays.
    """
    last = list(islice(filter(is_complete, steps), keep.last))
    if len(last) < keep.last:
        return []
    measured = (step for step in best_first if step in steps and is_complete(step))
    best = set(islice(measured, keep.best))
    return [
        step
        for step in steps
        if step < last[-1] and step not in best and not (keep.every and step % keep.every == 0)
    ]
