"""Keep a run's newest checkpoints, every n-th and the best; remove the others."""

import json
import logging
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from dtr_scale.checkpoint.best import BestTag
from dtr_scale.checkpoint.catalog import Catalog
from dtr_scale.errors import CheckpointError
from dtr_scale.storage.folder import Folder

log = logging.getLogger(__name__)

METRICS = "metrics.json"


@dataclass(frozen=True)
class Keep:
    """Keep the `last` checkpoints, those of `every` n-th step, and the `best` by `metric`.

    A lower metric is better; 0 means none. The one that is tagged as the best stays besides.
    """

    last: int = 3
    every: int = 0
    best: int = 0
    metric: str = "loss"


class Retention:
    """Apply a `Keep` to a run's checkpoints, on rank 0.

    Nothing is raised: a run is worth more than a tidy folder. In doubt all checkpoints stay.
    """

    def __init__(self, catalog: Catalog, keep: Keep) -> None:
        self._catalog = catalog
        self._keep = keep
        self._metrics = Metrics(catalog.folder)
        self._tag = BestTag(catalog.folder)

    def rank(self, step: int, value: float, metric: str, settings: str) -> None:
        """Tag the checkpoint of `step` if its evaluation's number is the lowest so far.

        It counts among numbers of one `metric` and the same `settings`.
        """
        try:
            self._tag.rank(step, value, metric, settings)
        except OSError as error:
            log.warning("step %d is not ranked by %s: %s", step, metric, error)

    def note(self, step: int, figures: Mapping[str, float]) -> None:
        """Store the figures of the checkpoint of `step`, to find the best by."""
        try:
            if self._keep.best:
                self._metrics.note(step, figures)
        except (OSError, CheckpointError) as error:
            log.warning("figures of step %d are not kept: %s", step, error)

    def retire(self, step: int) -> None:
        """Remove the checkpoints that are no longer to be kept now that `step` is complete."""
        keep = self._keep
        try:
            # A newer one was passed over as damaged when the run went on from an older one.
            steps = [old for old in self._catalog.steps() if old <= step]
            best_first = self._metrics.best_first(keep.metric) if keep.best else []
            is_complete = self._catalog.is_complete
            tagged = self._tag.best(lambda old: old in steps and is_complete(old))
            gone = superfluous(
                steps,
                keep,
                best_first=best_first,
                tagged=tagged.step if tagged else None,
                is_complete=is_complete,
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
            left = self._catalog.steps()
            self._tag.keep(left)
            if keep.best:
                self._metrics.keep(left)
        except (OSError, CheckpointError) as error:
            log.warning("old checkpoints stay in %s: %s", self._catalog.folder.url, error)


class Metrics:
    """Figures by step, in metrics.json beside the checkpoints, where the next job finds them.

    The training loop notes evaluations while the thread that saves reads, so both take the lock.
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
        # Read once: this job holds the folder, and nobody else writes there.
        if self._by_step is None:
            self._by_step = self._read()
        return self._by_step

    def _read(self) -> dict[int, dict[str, float]]:
        """Return what earlier jobs stored; CheckpointError if that is no metrics.json of ours.

        Taking such a file for empty would remove the best checkpoints so far.
        """
        try:
            stored = self._folder.read_json(METRICS)
            return {
                int(step): {name: float(value) for name, value in figures.items()}
                for step, figures in stored.items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f'{METRICS} in {self._folder.url} is not of the shape {{"STEP": {{"loss": 0.1}}}}: '
                f"{error}; mend it, or remove it if its best checkpoints need not stay"
            ) from None

    def _store(self) -> None:
        content = json.dumps({str(s): f for s, f in sorted(self._load().items())}, indent=1)
        self._folder.write_bytes(METRICS, content.encode())


def superfluous(
    steps: Sequence[int],
    keep: Keep,
    *,
    best_first: Sequence[int],
    is_complete: Callable[[int], bool],
    tagged: int | None = None,
) -> list[int]:
    """Return which of `steps` (newest first) may go.

    Incomplete ones are not counted. Nothing goes before there are `keep.last` complete ones, so at
    least one always stays.
    """
    # Complete ones alone: damaged newer ones would push out the one just saved. Lazily, since each
    # look reads an index.
    last = list(islice(filter(is_complete, steps), keep.last))
    if len(last) < keep.last:
        return []
    measured = (step for step in best_first if step in steps and is_complete(step))
    best = {*islice(measured, keep.best), tagged}
    return [
        step
        for step in steps
        if step < last[-1] and step not in best and not (keep.every and step % keep.every == 0)
    ]
