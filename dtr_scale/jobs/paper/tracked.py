"""Fetch what MLflow knows of a table's runs, as run directories."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dtr_scale.config.load import load_experiment
from dtr_scale.jobs.paper.collect import is_said_to_run
from dtr_scale.jobs.paper.tables import Table
from dtr_scale.train.run_dir import LOCK


@contextmanager
def tracked_runs(uri: str | None, table: Table, configs: Path) -> Iterator[Sequence[Path]]:
    """Yield directories with what a server has of the runs in the experiments of a table.

    Those of runs that are on this disk are the runs' own. Without a `uri` there are none.
    """
    if uri is None:
        yield ()
        return
    from dtr_scale.tracking.history import History  # MLflow takes seconds to import

    history = History(uri, Path("runs/any"))
    names = {name for part in table.parts for row in part.rows for name in row.configs}
    experiments = {load_experiment(configs / f"{n}.json").tracking.experiment for n in names}
    with tempfile.TemporaryDirectory(prefix="dtr_scale-") as folder:
        found = []
        for experiment in sorted(experiments):
            for run_id in history.find(experiment):
                place = history.directory(run_id)
                if place is None:
                    place = Path(folder) / run_id
                    place.mkdir()
                    history.fetch(run_id, place)
                    if is_said_to_run(place):
                        (place / LOCK).touch()  # by the server, which knows
                found.append(place)
        yield found
