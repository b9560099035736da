"""Find how far the runs of a table are, and their numbers beside the paper's."""

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from dtr_scale.config.changes import changes, flatten
from dtr_scale.config.load import filled_in, load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.paper.tables import (
    A100_BATCH,
    A100_GPUS,
    A100_SAMPLES_TIMES_MACS,
    A100_STEPS_PER_SECOND,
    Column,
    Row,
)
from dtr_scale.tracking.journal import Record, read_journal
from dtr_scale.train.run_dir import CONFIG, JOURNAL, LOCK, SAMPLES, STATUS, find_object

_EVALUATIONS = "evaluations.jsonl"  # evaluation/report.py loads torch
_INCEPTION_SHA256 = "6726825d"  # evaluation/features.py does, too
_ALIVE_SECONDS = 60.0  # a job renews its lock every few seconds
_SPEED_RECORDS = 50  # of a journal's end, whose median is a run's speed
_TOLD_SETTINGS = ("train.lr", "train.weight_decay", "train.ema_decay", "train.grad_clip")
# Of a run itself, so they differ between any two rows; or told by the row.
_OF_A_RUN = ("checkpoints", "ema", "seed", "step", "samples", "weights", "num_samples")


class Training(NamedTuple):
    """One of a row's trainings, as its file and the row say."""

    config: Path
    experiment: Experiment
    overrides: tuple[str, ...]
    """Of the row, and of the user for every row."""

    @property
    def data_set(self) -> str:
        return Path(str(self.experiment.data.shards)).name


class Standing(NamedTuple):
    """How far a training is."""

    run_dir: Path | None
    state: str
    """not started, running, finished, preempted, failed, or stopped without a word."""
    step: int
    max_steps: int
    eta_seconds: float | None
    differences: Sequence[str]
    """Settings with which the run is another than the row's."""

    def told(self) -> str:
        if self.run_dir is None:
            return self.state
        # A run that was longer has passed the step that a row asks for.
        told = f"{self.state}, step {self.step:,} of {self.max_steps:,}"
        if self.eta_seconds is not None:
            hours, minutes = divmod(round(self.eta_seconds / 60), 60)
            told += f", {hours}:{minutes:02d} h left"
        return told


class Cell(NamedTuple):
    """The paper's figure and ours."""

    paper: float | None
    ours: float | None
    differences: Mapping[str, tuple[Any, Any]]
    """Of the manifest: what the paper's protocol says, and ours."""
    manifest: Mapping[str, Any]


def trainings_of(
    row: Row, configs: Path, overrides: Sequence[str], data_root: str | None = None
) -> list[Training]:
    """Return the trainings of a row; ConfigError where its resolved experiment is not valid.

    Prepared data is in `data_root`, by the names that it has in the experiments.
    """
    changed = [f"--{key}={json.dumps(value)}" for key, value in row.changes.items()]
    trainings = []
    for name in row.configs:
        path, given = configs / f"{name}.json", (*changed, *overrides)
        training = Training(path, load_experiment(path, given), given)
        if data_root is not None:
            # First, so that one of the user's own goes before it.
            shards = f"--data.shards={data_root.rstrip('/')}/{training.data_set}/"
            given = (shards, *given)
            training = Training(path, load_experiment(path, given), given)
        trainings.append(training)
    return trainings


def run_place(experiment: Experiment, runs: Path) -> Path:
    """Return where a run is below the folder of all runs; experts share one."""
    path = experiment.run_path
    return runs / (path.parent.name if experiment.model.expert is not None else path.name)


def find_runs(runs: Path, tracked: Sequence[Path] = ()) -> dict[str, list[Path]]:
    """Return the run directories below a folder, and those of MLflow, by their experiments' names.

    A run that is in both is the farther of the two, as any two of a name.
    """
    below = [p for pattern in ("", "*/", "*/*/") for p in sorted(runs.glob(pattern + CONFIG))]
    found: dict[str, list[Path]] = {}
    for path in [*below, *(each / CONFIG for each in tracked)]:
        if name := find_object(path).get("name"):
            found.setdefault(name, []).append(path.parent)
    return found


def standing(training: Training, runs: Mapping[str, Sequence[Path]]) -> Standing:
    """Return how far a training is, by the run that is the farthest."""
    experiment = training.experiment
    max_steps = experiment.train.max_steps
    candidates = runs.get(experiment.name, ())
    if not candidates:
        return Standing(None, "not started", 0, max_steps, None, ())
    path = max(candidates, key=lambda each: _step(each))
    step, outcome = _step(path), find_object(path / STATUS).get("outcome", "")
    state, eta = outcome or "stopped", None
    if step >= max_steps:
        state = "finished"
    elif outcome == "running":
        state = "running" if _is_held(path) else "stopped"
    elif outcome == "finished":
        state = "stopped"  # at the end of a shorter run
    if state == "running" and (speed := _samples_per_second(path)):
        eta = (max_steps - step) * experiment.train.global_batch_size / speed
    return Standing(path, state, step, max_steps, eta, _setting_differences(path, experiment))


def cell(column: Column, row: Row, trainings: Sequence[Training], run_dir: Path | None) -> Cell:
    """Return the paper's figure and ours of one row and column."""
    experiment = trainings[0].experiment
    paper = row.figures.get(column.key, experiment.expected.get(column.key))
    if column.metric == "macs":
        return Cell(paper, _macs(trainings[0]) / 1e9, {}, {})
    if run_dir is None:
        return Cell(paper, None, {}, {})
    if column.metric == "steps_per_second":
        speed = _samples_per_second(run_dir)
        return Cell(paper, speed and speed / experiment.train.global_batch_size, {}, {})
    if column.metric == "cka":
        return _cka(paper, run_dir)
    asked = _protocol(column, row, experiment)
    found = [
        (_manifest_differences(asked, report["manifest"], experiment), report)
        for report in reports(run_dir)
        if column.metric in report["metrics"]
    ]
    if column.step is not None:  # a curve has no number of another step in its place
        found = [(d, report) for d, report in found if "step" not in d]
    if not found:
        return Cell(paper, None, {}, {})
    # The closest to the paper's; of equals the newest.
    differences, report = min(reversed(found), key=lambda each: len(each[0]))
    return Cell(paper, report["metrics"][column.metric], differences, report["manifest"])


def differences_between(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return what differs between the manifests of rows, by key and row.

    Not what is of a run itself, such as its checkpoint.
    """
    flat = {label: flatten(dict(manifest)) for label, manifest in manifests.items() if manifest}
    keys = sorted({key for manifest in flat.values() for key in manifest})
    found = {}
    for key in keys:
        if key.split(".")[0] in _OF_A_RUN:
            continue
        values = {label: manifest.get(key) for label, manifest in flat.items()}
        if len({json.dumps(value) for value in values.values()}) > 1:
            found[key] = values
    return found


def gpu_hours(training: Training) -> tuple[float, bool]:
    """Return the A100 hours of a training, and whether they are estimated by its arithmetic."""
    experiment = training.experiment
    train, model = experiment.train, experiment.model
    if stated := experiment.expected.get("a100_hours"):
        return stated, False
    samples = train.max_steps * train.global_batch_size
    variant = getattr(model, "variant", None)
    speed = A100_STEPS_PER_SECOND.get((str(variant), model.routing.type != "none"))
    if speed is not None:
        # Cross-attention is not in table 7.
        seconds, is_estimate = samples / (speed * A100_BATCH), model.conditioning == "text"
    else:
        seconds, is_estimate = samples * _macs(training) / A100_SAMPLES_TIMES_MACS, True
    return A100_GPUS * seconds / 3600, is_estimate


def _macs(training: Training) -> float:
    return _macs_of(str(training.config), training.overrides)


@cache
def _macs_of(config: str, overrides: tuple[str, ...]) -> float:
    from dtr_scale.jobs.plan.compute import plan_compute  # loads torch

    return float(plan_compute(load_experiment(config, overrides)).forward.total.macs)


def _protocol(column: Column, row: Row, experiment: Experiment) -> dict[str, Any]:
    """Return what the manifest of the paper's number would say."""
    evaluation = experiment.evaluation.model_dump(mode="json")
    evaluation |= {key.removeprefix("evaluation."): v for key, v in row.measured_with.items()}
    keys = ("sampler", "num_sampling_steps", "cfg_scale", "cfg_channels", "cfg_interval")
    return {
        **{key: evaluation[key] for key in keys},
        "noise_schedule": experiment.diffusion.noise_schedule,
        "num_timesteps": experiment.diffusion.num_timesteps,
        "num_samples": column.num_samples,
        "step": column.step or experiment.train.max_steps,
        "features": "inception",
    }


def _manifest_differences(
    asked: Mapping[str, Any], manifest: Mapping[str, Any], experiment: Experiment
) -> dict[str, tuple[Any, Any]]:
    ours = {**manifest, "features": _features(manifest.get("features"))}
    all_channels = experiment.model.in_channels
    found = {}
    for key, value in asked.items():
        other = ours.get(key)
        if key == "cfg_channels":
            value, other = value or all_channels, other or all_channels
        if value != other:
            found[key] = (value, other)
    # Unguided, it does not matter which channels are not guided.
    if asked["cfg_scale"] == 1.0 and "cfg_scale" not in found:
        found.pop("cfg_channels", None)
        found.pop("cfg_interval", None)
    return found


def _features(told: Any) -> str:  # noqa: ANN401
    """Return by which network a number is, `inception` for the published Inception alone."""
    if not isinstance(told, dict):
        return str(told)
    if "inception" in told:
        is_published = str(told["inception"].get("weights_sha256", "")).startswith(
            _INCEPTION_SHA256
        )
        return "inception" if is_published else "inception of other weights"
    return ", ".join(told)


def _cka(paper: float | None, run_dir: Path) -> Cell:
    import numpy as np

    path = run_dir / SAMPLES / "cka.npz"
    if not path.exists():
        return Cell(paper, None, {}, {})
    with np.load(path) as stored:
        matrices = stored["cka"]  # [depth, S, S]
        manifest = json.loads(str(stored["manifest"])) if "manifest" in stored.files else {}
    # A timestep is like itself: the diagonal says nothing.
    others = ~np.eye(matrices.shape[-1], dtype=bool)
    return Cell(paper, float(matrices[:, others].mean()), {}, manifest)


def _setting_differences(path: Path, experiment: Experiment) -> list[str]:
    stored = find_object(path / CONFIG)
    try:
        found = changes(stored, filled_in(experiment), source=str(path / CONFIG))
    except (ConfigError, AttributeError, TypeError):
        return [f"{path / CONFIG} cannot be read"]
    return [
        f"{each.key}: {each.after}, the run's {each.before}"
        for each in found
        if each.identity or each.key in _TOLD_SETTINGS
    ]


def reports(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's evaluations in their order, without a line that a kill cut off."""
    try:
        lines = (run_dir / _EVALUATIONS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report.get("metrics"), dict) and isinstance(report.get("manifest"), dict):
            report["manifest"].setdefault("step", report.get("step"))
            found.append(report)
    return found


def _samples_per_second(run_dir: Path) -> float | None:
    speeds = [r["samples_per_second"] for r in _journal(run_dir) if "samples_per_second" in r]
    speeds = [speed for speed in speeds[-_SPEED_RECORDS:] if math.isfinite(speed)]
    return statistics.median(speeds) if speeds else None


def _step(run_dir: Path) -> int:
    step = find_object(run_dir / STATUS).get("step")
    # status.json is written at checkpoints, the journal at every logged step.
    steps = [step] if isinstance(step, int) else [0]
    return max([*steps, *(int(record["step"]) for record in _journal(run_dir)[-1:])])


def _journal(run_dir: Path) -> list[Record]:
    path = run_dir / JOURNAL
    return list(read_journal(path)) if path.exists() else []


def is_said_to_run(run_dir: Path) -> bool:
    """Tell whether a run has not told its end; its job may be gone all the same."""
    return find_object(run_dir / STATUS).get("outcome") == "running"


def _is_held(run_dir: Path) -> bool:
    try:
        return time.time() - (run_dir / LOCK).stat().st_mtime < _ALIVE_SECONDS
    except OSError:
        return False
