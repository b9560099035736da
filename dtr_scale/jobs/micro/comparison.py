"""Reproduce the paper's comparison in small: a DiT on Fashion-MNIST under six conditions.

Every run is trained to each of a few points and measured there, so that a kill at any moment costs
no more than a checkpoint's steps and one measurement.
"""

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dtr_scale.config.load import load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.paper.collect import reports
from dtr_scale.storage.folder import open_folder

log = logging.getLogger(__name__)

CONFIG = "micro_fashion.json"
SOURCE = Path("/usr/share/datasets/fashion-mnist")
POINTS = (0.125, 0.25, 0.5, 1.0)
"""Where a run is measured, as parts of its steps."""
PLAN, DATA, RUNS, LOGS = "plan.json", "data", "runs", "logs"

_NONE = {"model.routing": {"type": "none"}}
_RANDOM = {"model.routing": {"type": "random", "beta": 0.8}}
_DTR = {"model.routing": {"type": "dtr", "alpha": 4, "beta": 0.8}}
_VANILLA = {"objective.type": "vanilla"}
_MIN_SNR = {"objective.type": "min_snr", "objective.gamma": 5.0}
_ANT_UW = {"objective.type": "ant_uw"}


class Condition(NamedTuple):
    label: str
    changes: Mapping[str, Any]
    """Of the base experiment, by its keys."""


CONDITIONS = {
    "none_vanilla": Condition("no routing", _NONE | _VANILLA),
    "random_vanilla": Condition("R-TR", _RANDOM | _VANILLA),
    "dtr_vanilla": Condition("DTR", _DTR | _VANILLA),
    "dtr_minsnr": Condition("DTR, Min-SNR", _DTR | _MIN_SNR),
    "none_antuw": Condition("no routing, ANT-UW", _NONE | _ANT_UW),
    "dtr_antuw": Condition("DTR, ANT-UW", _DTR | _ANT_UW),
}


class MicroRun(NamedTuple):
    """A training of one condition from one seed."""

    condition: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.condition}_s{self.seed}"


@dataclass(frozen=True)
class Micro:
    """What is trained, from what, and where."""

    config: Path
    out: Path
    source: Path
    conditions: Sequence[str]
    num_seeds: int
    overrides: Sequence[str] = ()
    """Of every run."""

    @property
    def runs(self) -> list[MicroRun]:
        """All runs, seed by seed: what is stopped early compares all conditions."""
        return [MicroRun(c, seed) for seed in range(self.num_seeds) for c in self.conditions]

    @property
    def data(self) -> Path:
        return self.out / DATA

    def run_dir(self, run: MicroRun) -> Path:
        return self.out / RUNS / run.name

    def experiment(self, run: MicroRun, max_steps: int | None = None) -> Experiment:
        """Return the experiment of a run, to its end or to `max_steps`."""
        changes = dict(CONDITIONS[run.condition].changes)
        if changes["model.routing"]["type"] == "random":
            # Seeds differ in their masks, too: one draw of them may be lucky.
            changes["model.routing"] = changes["model.routing"] | {"seed": run.seed}
        changes |= {
            "name": run.name,
            "run_dir": str(self.run_dir(run)),
            "data.shards": str(self.data),
            "train.seed": run.seed,
        }
        given = [f"--{key}={json.dumps(value)}" for key, value in changes.items()]
        last = [] if max_steps is None else [f"--train.max_steps={max_steps}"]
        return load_experiment(self.config, [*given, *self.overrides, *last])

    @cached_property
    def base(self) -> Experiment:
        """The experiment of the first run; all are of the same length."""
        return self.experiment(self.runs[0])

    @property
    def points(self) -> list[int]:
        """The steps at which runs are measured."""
        steps = self.base.train.max_steps
        return sorted({max(1, round(part * steps)) for part in POINTS})

    def measured(self, run: MicroRun) -> dict[int, dict[str, float]]:
        """Return the numbers of a run by step."""
        return {
            report["manifest"]["step"]: report["metrics"]
            for report in reports(self.run_dir(run))
            # Not what `dtr-scale evaluate` has found of the same checkpoint.
            if {"fd_efficientnet", "eval_loss"} <= report["metrics"].keys()
        }

    def is_finished(self, run: MicroRun) -> bool:
        return set(self.points) <= self.measured(run).keys()

    def keep_plan(self) -> None:
        """Write down what is reproduced in `out`; ConfigError if it is something else already."""
        plan = {
            "conditions": list(self.conditions),
            "seeds": self.num_seeds,
            "source": str(self.source.absolute()),
            "points": self.points,
            "experiments": {run.name: _what_it_is(self.experiment(run)) for run in self.runs},
        }
        plan = json.loads(json.dumps(plan))
        path = self.out / PLAN
        if not path.exists():
            content = json.dumps(plan, indent=2) + "\n"
            open_folder(self.out).write_bytes(PLAN, content.encode())
            return
        kept = json.loads(path.read_bytes())
        if kept != plan:
            differing = ", ".join(key for key in plan if kept.get(key) != plan[key])
            raise ConfigError(
                f"{self.out} holds another reproduction: {differing} of its {PLAN} differ; give "
                "the options that it was begun with, or another --out"
            )

    @contextmanager
    def held(self, run: MicroRun) -> Iterator[None]:
        """Hold a run for this process; wait for one that is about to leave it."""
        folder = self.out / LOGS
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{run.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _what_it_is(experiment: Experiment) -> dict[str, Any]:
    sections = ("model", "diffusion", "objective", "train", "evaluation")
    return {section: getattr(experiment, section).model_dump(mode="json") for section in sections}


def run_one(micro: Micro, run: MicroRun) -> int:
    """Train and measure a run point by point, from where it stands; return the exit code.

    75: it was asked to leave, and goes on when it is started again.
    """
    from dtr_scale.jobs.micro.measure import measure_run
    from dtr_scale.jobs.train import train_experiment

    with micro.held(run):
        for step in micro.points:
            if step in micro.measured(run):
                continue
            if code := train_experiment(micro.experiment(run, step)):
                return code
            is_last = step == micro.points[-1]
            measure_run(micro.run_dir(run), step, with_legibility=is_last)
    return 0


def find_run(micro: Micro, name: str) -> MicroRun:
    """Return a run by its name, as in `--only`."""
    for run in micro.runs:
        if run.name == name:
            return run
    names = ", ".join(run.name for run in micro.runs)
    raise ConfigError(f"--only={name} is none of the runs; accepted: {names}")


def check_conditions(names: Sequence[str]) -> Sequence[str]:
    """Return names of conditions; ConfigError for one that is unknown."""
    for name in names:
        if name not in CONDITIONS:
            raise ConfigError(
                f"--conditions: {name!r} is unknown; accepted: {', '.join(CONDITIONS)}"
            )
    return names
