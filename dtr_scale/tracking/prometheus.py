"""Write a run's newest figures to metrics.prom, for the textfile collector of node_exporter.

The text format of Prometheus, version 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats/
Every figure is a gauge: a run that goes on from an older checkpoint goes back with it.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from dtr_scale.storage.local import replacing
from dtr_scale.tracking.attempts import read_attempts
from dtr_scale.tracking.base import Tracker
from dtr_scale.tracking.journal import Record

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.prom"
_PREFIX = "dtr_scale_"
_NUMBERED = re.compile(r"(loss_cluster|uw_log_var)_(\d+)")

Labels = tuple[tuple[str, str], ...]


class PrometheusFile(Tracker):
    """Keeps metrics.prom at the newest record, and at the end tells that nothing runs any more."""

    def __init__(
        self, run_dir: Path, name: str, *, max_steps: int, saved_step: Callable[[], int | None]
    ) -> None:
        self._run_dir = run_dir
        self._run: Labels = (("run", name),)
        self._max_steps = max_steps
        self._saved_step = saved_step
        self._record: Record = {}
        self._failing = False
        self._write({"up": 1})

    def log(self, record: Record) -> None:
        self._record = record
        self._write({"up": 1})

    def look(self) -> None:
        """Leave it to the next record: a save's thread would write at the same time."""

    def finish(self) -> None:
        goodput = next((a.run_goodput for a in reversed(read_attempts(self._run_dir))), None)
        self._write({"up": 0} | ({"goodput": goodput} if goodput is not None else {}))

    def _write(self, more: Mapping[str, float]) -> None:
        saved = self._saved_step()
        figures = {**more, "max_steps": self._max_steps, **self._record}
        figures |= {"saved_step": saved} if saved is not None else {}
        try:
            # Renamed when it is whole; not synced, since the next record replaces it.
            with replacing(self._run_dir / METRICS_FILE) as temporary:
                temporary.write_text(exposition(figures, self._run), encoding="utf-8")
        except OSError as error:
            if not self._failing:
                place = self._run_dir / METRICS_FILE
                log.warning("%s cannot be written, training goes on: %s", place, error.strerror)
            self._failing = True
        else:
            self._failing = False


def exposition(figures: Mapping[str, float], labels: Labels) -> str:
    """Return figures by keys of the journal as Prometheus reads them.

    >>> print(exposition({"loss_cluster_3": 0.5}, (("run", "a"),)), end="")
    # TYPE dtr_scale_loss_cluster gauge
    dtr_scale_loss_cluster{run="a",cluster="3"} 0.5
    """
    families: dict[str, list[str]] = {}
    for key, value in figures.items():
        numbered = _NUMBERED.fullmatch(key)
        name = _PREFIX + re.sub(r"[^A-Za-z0-9_]", "_", numbered[1] if numbered else key)
        own = (*labels, ("cluster", numbered[2])) if numbered else labels
        told = ",".join(f'{label}="{_escaped(text)}"' for label, text in own)
        families.setdefault(name, []).append(f"{name}{{{told}}} {_number(value)}\n")
    # All lines of a name stand together, after its type.
    return "".join(f"# TYPE {name} gauge\n" + "".join(lines) for name, lines in families.items())


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return "NaN" if math.isnan(value) else repr(value)
