"""Small runs of the demo's experiment for tests, in this process or on ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtr_scale.config.load import load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.jobs.build import build_trainer
from dtr_scale.jobs.in_training import build_evaluation
from dtr_scale.jobs.train import train_experiment
from dtr_scale.signals import LeaveRequest
from dtr_scale.tracking.journal import TIMINGS, Record
from dtr_scale.train.trainer import Trainer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo_digits.json"
SMALL = (
    "--model.hidden_size=32",
    "--model.depth=2",
    "--data.num_workers=0",
    "--tracking.type=none",
    "--train.log_every=1",
    "--checkpoint.every_steps=1000",
)
SINGLE = ("--engine.type=single", "--engine.precision=fp32")
BATCH = ("--train.global_batch_size=32", "--train.micro_batch_size=32")
TINY = (*BATCH, "--train.max_steps=4", "--checkpoint.every_steps=2")


def demo_experiment(digits: Path | str, run_dir: Path, *overrides: str) -> Experiment:
    """Return the demo's experiment on a prepared folder, smaller unless overridden."""
    places = (f"--data.shards={digits}", f"--run_dir={run_dir}")
    return load_experiment(DEMO, [*SMALL, *places, *overrides])


def train(digits: Path | str, run_dir: Path, *overrides: str) -> int:
    """Train in this process and return the exit code."""
    return train_experiment(demo_experiment(digits, run_dir, *SINGLE, *overrides))


def tiny(digits: Path | str, run_dir: Path, *overrides: str) -> int:
    """Train four steps in this process, saving every second one, and return the exit code."""
    return train(digits, run_dir, *TINY, *overrides)


def run_trainer(
    trainer: Trainer, evaluate: Callable[[int], str | None] | None = None
) -> list[Record]:
    """Run a trainer to its end and return the records of its steps."""
    records: list[Record] = []
    trainer.run(LeaveRequest(), log=records.append, evaluate=evaluate)
    trainer.loader.close()
    return records


def train_on(
    world: World, experiment: Experiment, *, resume: bool = False, evaluating: bool = False
) -> list[Record]:
    """Train an experiment on a rank's world and return the records of its steps."""
    trainer = build_trainer(experiment, world)
    if resume:
        assert trainer.resume()
    if evaluating:
        return run_trainer(trainer, build_evaluation(experiment, trainer, None))
    return run_trainer(trainer)


def journal(run_dir: Path) -> list[Record]:
    """Return a run's journal without the figures that tell the time."""
    lines = (run_dir / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMINGS}
        for line in lines
    ]


def status(run_dir: Path) -> dict[str, Any]:
    """Return what a run tells about itself."""
    return json.loads((run_dir / "status.json").read_text(encoding="utf-8"))


def steps_in(run_dir: Path) -> int:
    """Return how many records a run's journal holds by now."""
    path = run_dir / "journal.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kept(run_dir: Path) -> list[int]:
    """Return the steps whose checkpoints a run has kept."""
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step_*"))


def copied(digits: Path, tmp_path: Path) -> Path:
    """Copy the digits to where a test may damage them."""
    place = tmp_path / "digits"
    place.mkdir()
    for path in digits.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def damage(file: Path, how: str) -> None:
    """Damage a rank's file of a checkpoint: "cut", "flipped" (a bit), or "unmarked" (COMPLETE)."""
    content = bytearray(file.read_bytes())
    if how == "unmarked":
        (file.parent / "COMPLETE").unlink()
    elif how == "cut":
        file.write_bytes(content[:-100])
    else:
        content[-1] ^= 1
        file.write_bytes(content)
