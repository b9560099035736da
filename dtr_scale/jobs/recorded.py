"""Read what runs have recorded, on disk or in MLflow, to compare them."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_scale.checkpoint.inspection import find_checkpoints
from dtr_scale.config.changes import flatten
from dtr_scale.config.load import filled_in, validate
from dtr_scale.errors import ConfigError, DtrScaleError
from dtr_scale.evaluation.comparison.record import Evaluation, RunRecord, as_columns
from dtr_scale.evaluation.report import EVALUATIONS
from dtr_scale.jobs.trained import expert_dirs
from dtr_scale.tracking.journal import read_journal
from dtr_scale.tracking.uri import shown_uri, tracking_uri
from dtr_scale.train.run_dir import CONFIG, JOURNAL, SAMPLES, STATUS, find_object

if TYPE_CHECKING:
    from dtr_scale.tracking.history import History

log = logging.getLogger(__name__)

_BESIDE_THE_RUNS = Path("runs/any")
MOST_RUNS = 26
"""As many as there are letters to tell them apart."""


def read_runs(places: Sequence[str], uri: str | None = None) -> list[RunRecord]:
    """Return the runs that `places` name: run directories, MLflow run ids or experiments.

    Raises ConfigError for a place that is none of them, and for a run that is given twice.
    """
    seen: dict[str, str] = {}
    runs: list[RunRecord] = []
    for place in places:
        is_here = Path(place).is_dir()
        for run in [read_run_dir(Path(place))] if is_here else _tracked(place, uri):
            same = str(Path(run.place).resolve()) if Path(run.place).is_dir() else run.place
            if same in seen:
                raise ConfigError(f"{place!r} and {seen[same]!r} are the same run; give it once")
            seen[same] = place
            runs.append(run)
    return runs


def _tracked(place: str, configured: str | None) -> list[RunRecord]:
    """Return the run of an id, or the runs of an experiment, that MLflow has."""
    uri = tracking_uri(configured, _BESIDE_THE_RUNS)
    database = uri.removeprefix("sqlite:///")
    if uri != database and not Path(database).exists():  # MLflow would make one
        raise ConfigError(
            f"{place!r} is no run directory, and there is no MLflow database {database} to look "
            "it up in; give a directory that `dtr-scale train` wrote, or --tracking-uri"
        )
    from dtr_scale.tracking.history import History  # MLflow takes seconds to import

    history = History(uri, _BESIDE_THE_RUNS)
    found = history.find(place)
    if not found:
        raise ConfigError(
            f"{place!r} is no run directory, and neither a run nor an experiment of MLflow at "
            f"{shown_uri(uri)}; give a directory that `dtr-scale train` wrote"
        )
    runs = []
    for run_id in found:
        try:
            runs.append(_read_tracked(history, run_id))
        except ConfigError as error:
            if len(found) == 1:
                raise
            log.warning("run %s of %r is left out: %s", run_id, place, error)
    return runs


def _read_tracked(history: "History", run_id: str) -> RunRecord:
    if here := history.directory(run_id):
        return read_run_dir(here)
    with tempfile.TemporaryDirectory(prefix="dtr_scale-") as folder:
        history.fetch(run_id, Path(folder))
        try:
            run = read_run_dir(Path(folder))
        except ConfigError as error:  # of a run that the user knows by its id
            raise ConfigError(str(error).replace(folder, run_id)) from None
        # The folder is gone when they are looked at.
        pictures = {step: read() for step, read in run.grids.items()}
    grids = {step: partial(bytes, picture) for step, picture in pictures.items()}
    return replace(run, place=run_id, grids=grids)


def read_run_dir(path: Path) -> RunRecord:
    """Return what a run directory holds, also of a run that goes on.

    Raises ConfigError for what is no run directory, and for a run that has not logged a step.
    """
    config = _read_config(path)
    journal = path / JOURNAL
    records = list(read_journal(journal)) if journal.exists() else []
    if not records:
        raise ConfigError(
            f"{str(path)!r} has no step in {JOURNAL} yet; wait for its first train.log_every "
            "steps, or leave it out"
        )
    return RunRecord(
        name=str(config.get("name", path.name)),
        place=str(path),
        settings=flatten(config),
        journal=as_columns(records),
        outcome=find_object(path / STATUS).get("outcome", ""),
        evaluations=read_evaluations(path / EVALUATIONS),
        grids={
            int(picture.stem.removeprefix("step_")): picture.read_bytes
            for picture in sorted((path / SAMPLES).glob("step_*.png"))
            if picture.stem.removeprefix("step_").isdecimal()
        },
        facts=_facts(path, config),
    )


def read_evaluations(path: Path) -> list[Evaluation]:
    """Return the evaluations of a run, by step and time; a line that is cut off is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found, damaged = [], 0
    for line in lines:
        try:
            found.append(as_evaluation(json.loads(line)))
        except (ValueError, TypeError, KeyError, AttributeError):
            damaged += 1
    if damaged:
        log.warning(
            "%s: %d of %d lines are no evaluations, and left out", path, damaged, len(lines)
        )
    return sorted(found, key=lambda each: (each.step or 0, each.time))


def as_evaluation(stored: Mapping[str, Any]) -> Evaluation:
    """Return a line of evaluations.jsonl as an evaluation."""
    manifest = stored["manifest"]
    step = stored.get("step", manifest.get("step"))
    return Evaluation(
        step=None if step is None else int(step),
        time=str(stored.get("time", "")),
        metrics={name: float(value) for name, value in stored["metrics"].items()},
        manifest=manifest,
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).exists():
        experts = expert_dirs(path) if path.is_dir() else []
        fix = "give the directory that `dtr-scale train` wrote, for example runs/demo_digits"
        if experts:
            fix = f"each expert is a run of its own; give {experts[0]}"
        raise ConfigError(f"{str(path)!r} is no run directory: it has no {CONFIG}; {fix}")
    config = find_object(path / CONFIG)
    if not config:
        raise ConfigError(f"{path / CONFIG} is not JSON; repair it, or leave the run out")
    return _with_defaults(config, str(path / CONFIG))


def _with_defaults(config: dict[str, Any], source: str) -> dict[str, Any]:
    # A key that is newer than a run had its default there; what the schema refuses was trained all
    # the same.
    try:
        return filled_in(validate(config, source))
    except ConfigError:
        return config


def _facts(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the newest checkpoint tells of a run, where that is on this disk."""
    elsewhere = config.get("checkpoint", {}).get("dir") or ""
    if "://" in elsewhere:
        return {}  # a comparison waits for no network
    try:
        meta = find_checkpoints(str(path))[0].open().meta
    except (DtrScaleError, OSError, ValueError, KeyError):
        return {}
    return {key: meta[key] for key in ("world_size", "manifest_hash") if key in meta}
