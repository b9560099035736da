"""Make a table of the paper: say what it takes, start what is missing, print ours beside it."""

import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dtr_scale.errors import ConfigError
from dtr_scale.jobs.paper.collect import (
    Training,
    cell,
    differences_between,
    find_runs,
    run_place,
    standing,
    trainings_of,
)
from dtr_scale.jobs.paper.launches import (
    EXIT_FAILED,
    EXIT_GO_ON,
    Places,
    array_command,
    measure_commands,
    start,
    train_command,
)
from dtr_scale.jobs.paper.tables import TABLES, Column, Row, Table
from dtr_scale.jobs.paper.text import (
    FoundPart,
    FoundRow,
    all_trainings,
    identity,
    manifests_of,
    table_text,
    total_hours,
)

log = logging.getLogger(__name__)


class Reproduction:
    """One table, with the places of its runs and overrides for all of them."""

    def __init__(self, name: str, places: Places, overrides: Sequence[str] = ()) -> None:
        self.name = name
        self.table: Table = TABLES[name]
        self._places = places
        self._overrides = overrides

    def found(self) -> list[FoundPart]:
        """Return every row with how far it is."""
        runs = find_runs(self._places.runs, self._places.tracked)
        return [
            FoundPart(part, [self._found(row, part.columns, runs) for row in part.rows])
            for part in self.table.parts
        ]

    def _found(self, row: Row, columns: Sequence[Column], runs: Mapping[str, Any]) -> FoundRow:
        trainings = trainings_of(row, self._places.configs, self._overrides, self._places.data_root)
        standings = [standing(training, runs) for training in trainings]
        run_dir = standings[0].run_dir
        if run_dir is not None and trainings[0].experiment.model.expert is not None:
            run_dir = run_dir.parent  # where all experts together are measured
        cells = [cell(column, row, trainings, run_dir) for column in columns]
        return FoundRow(row, trainings, standings, cells)

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Yield what is missing, as (row, command), each training once."""
        seen: set[tuple[str, ...]] = set()
        for part in self.found():
            for found in part.rows:
                for training, each in zip(found.trainings, found.standings, strict=True):
                    if each.state != "finished":
                        yield from _once(found, train_command(training, self._places), seen)
                if _is_measured(found, part.part.columns):
                    continue
                for command in measure_commands(
                    found.row, part.part.columns, found.trainings[0], self._places
                ):
                    yield from _once(found, command, seen)

    def run(self) -> int:
        """Train and measure what is missing, one after the other; return the exit code.

        75: one was asked to leave; the same command goes on. A row that fails is told, and the
        next one begun.
        """
        failed = []
        done: set[tuple[str, ...]] = set()
        # Asked anew after each: what a training has made decides what is missing.
        while step := next((c for c in self.commands() if tuple(c[1]) not in done), None):
            label, command = step
            done.add(tuple(command))
            code = start(command)
            if code in (EXIT_GO_ON, 130) or self._was_asked_to_leave(command):
                log.info("leaving: start the command again to go on")
                return EXIT_GO_ON
            if code:
                failed.append(f"{label}: {shlex.join(command)} ended with {code}")
        for each in failed:
            log.error("%s", each)
        return EXIT_FAILED if failed else 0

    def _was_asked_to_leave(self, command: Sequence[str]) -> bool:
        """Tell whether a training left on request: launchers change exit codes."""
        return any(
            each.state == "preempted"
            for _, training, each in all_trainings(self.found())
            if train_command(training, self._places) == list(command)
        )

    def slurm_command(self, options: str) -> list[str]:
        """Return what submits the missing trainings as a job array; ConfigError if none is."""
        trainings: dict[tuple[str, int | None], Training] = {}
        for _, training, each in all_trainings(self.found()):
            if each.state in ("finished", "running"):
                continue
            # Of a training that rows ask for twice, the longer one.
            before = trainings.get(identity(training))
            if before is None or _steps(before) < _steps(training):
                trainings[identity(training)] = training
        if not trainings:
            raise ConfigError(f"{self.name}: all of its trainings are finished or running")
        return array_command(list(trainings.values()), self._places, options, self.name)

    def text(self) -> str:
        """Return the table as text."""
        return table_text(self.table, self.found())

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain JSON data."""
        parts = self.found()
        return {
            "name": self.name,
            "title": self.table.title,
            "note": self.table.note,
            "parts": [
                {
                    "title": each.part.title,
                    "columns": [column.title for column in each.part.columns],
                    "rows": [self._row_json(row, each.part.columns) for row in each.rows],
                    "differences_between_rows": differences_between(manifests_of(each)),
                }
                for each in parts
            ],
            "a100_hours": total_hours(parts)[0],
            "a100_hours_left": total_hours(parts, left=True)[0],
            "commands": [shlex.join(command) for _, command in self.commands()],
        }

    def _row_json(self, found: FoundRow, columns: Sequence[Column]) -> dict[str, Any]:
        hours, is_estimate = found.hours
        return {
            "label": found.row.label,
            "note": found.row.note,
            "a100_hours": hours,
            "a100_hours_are_estimated": is_estimate,
            "trainings": [
                {
                    "config": str(training.config),
                    "overrides": list(training.overrides),
                    "run_dir": str(
                        each.run_dir or run_place(training.experiment, self._places.runs)
                    ),
                    "state": each.state,
                    "step": each.step,
                    "max_steps": each.max_steps,
                    "eta_seconds": each.eta_seconds,
                    "settings_that_differ": list(each.differences),
                }
                for training, each in zip(found.trainings, found.standings, strict=True)
            ],
            "figures": {
                column.title: {
                    "paper": each.paper,
                    "ours": each.ours,
                    "manifest_differences": {
                        key: {"paper": paper, "ours": ours}
                        for key, (paper, ours) in each.differences.items()
                    },
                }
                for column, each in zip(columns, found.cells, strict=True)
            },
        }


def _is_measured(found: FoundRow, columns: Sequence[Column]) -> bool:
    """Tell whether the row has each of its figures by the paper's protocol."""
    wanted = [
        each
        for column, each in zip(columns, found.cells, strict=True)
        if column.step is None and column.metric not in ("macs", "steps_per_second")
    ]
    return all(each.ours is not None and not each.differences for each in wanted)


def _once(
    found: FoundRow, command: list[str], seen: set[tuple[str, ...]]
) -> Iterator[tuple[str, list[str]]]:
    if tuple(command) not in seen:
        seen.add(tuple(command))
        yield found.row.label, command


def _steps(training: Training) -> int:
    return training.experiment.train.max_steps
