"""Compare runs: tables for the terminal, and a page with plots."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.comparison.page import comparison_files
from dtr_scale.evaluation.comparison.record import RunRecord
from dtr_scale.evaluation.comparison.tables import comparison_tables, table_text
from dtr_scale.jobs.recorded import MOST_RUNS, read_runs
from dtr_scale.jobs.trained import check_output
from dtr_scale.storage.folder import open_folder

log = logging.getLogger(__name__)

PAGE = "index.html"


def compare_runs(
    places: Sequence[str], *, out: Path | None = None, tracking_uri: str | None = None
) -> tuple[str, Path | None]:
    """Compare runs; return the tables as text, and the page written to `out`.

    `places` are run directories, ids of MLflow runs, or names of MLflow experiments, which stand
    for all their runs. Raises ConfigError for what is none of them, and for fewer than two runs.
    """
    if out is not None:
        check_output(out, "")
    runs = _told_apart(read_runs(places, tracking_uri))
    if len(runs) < 2:
        raise ConfigError(
            f"{places[0]!r} is one run; give another one to compare it with, or see "
            f"`dtr-scale plots {places[0]}`"
        )
    if len(runs) > MOST_RUNS:
        raise ConfigError(
            f"{len(runs)} runs are too many to tell apart; give at most {MOST_RUNS} of them"
        )
    text = "\n\n".join(table_text(table) for table in comparison_tables(runs))
    if out is None:
        return text, None
    out.mkdir(parents=True, exist_ok=True)
    # The page last: where it is, its pictures are.
    files = comparison_files(runs)
    for name in sorted(files, key=lambda name: name == PAGE):
        open_folder(out).write_bytes(name, files[name])
    return text, out / PAGE


def _told_apart(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs, those of the same name with where they are from."""
    counts = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.name} ({run.place})") if counts[run.name] > 1 else run
        for run in runs
    ]
