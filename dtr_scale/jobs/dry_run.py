"""Check all that a training needs and tell what it would do, without writing anything."""

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from dtr_scale.checkpoint.lease import is_held
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.banner import banner, place_of
from dtr_scale.jobs.build import build_trainer
from dtr_scale.jobs.in_training import build_evaluation
from dtr_scale.jobs.plan.compute import plan_compute
from dtr_scale.jobs.resume import go_on
from dtr_scale.jobs.tracking import check_tracking
from dtr_scale.jobs.train import join
from dtr_scale.storage.folder import open_folder
from dtr_scale.train.run_dir import LOCK
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)


def dry_run(experiment: Experiment) -> None:
    """Do what a training does before its first step, and print what would follow.

    Data, network, engine, evaluation, MLflow's address and the checkpoint to go on from are read as
    the training would; what it would refuse raises the same error. Every rank calls it.
    """
    world = join(experiment)
    with world.agree():
        if world.is_main:
            check_tracking(experiment)
            _check_run_dir(experiment.run_path)
    trainer = build_trainer(experiment, world)
    try:
        build_evaluation(experiment, trainer, run_dir=None)
        begins = _begins(trainer, experiment)
    finally:
        trainer.loader.close()
        trainer.checkpoints.close()
    hosts = world.all_gather_object(socket.gethostname())
    if world.is_main:
        for line in _told(experiment, trainer, hosts, begins):
            print(line, flush=True)
    world.leave()


def _begins(trainer: Trainer, experiment: Experiment) -> str:
    """Return how the run would begin; ConfigError if the checkpoint there is another run's."""
    found = bool(trainer.checkpoints.steps())
    if experiment.checkpoint.resume == "never":
        return "afresh, and sets the earlier run aside" if found else "at step 0"
    if go_on(trainer, experiment, run_dir=None):
        return f"at step {trainer.step}, with the newest checkpoint"
    if experiment.checkpoint.start_from:
        return f"at step 0, with the weights of {experiment.checkpoint.start_from}"
    return "at step 0"


def _told(experiment: Experiment, trainer: Trainer, hosts: Sequence[str], begins: str) -> list[str]:
    plan = plan_compute(experiment)
    return [
        *banner(experiment, place_of(trainer, hosts), plan.forward.total),
        f"begins   {begins}",
        "",
        plan.table(per_layer=False),
        "",
        "dry run: all of it was checked, nothing was written",
    ]


def _check_run_dir(path: Path) -> None:
    """Raise ConfigError where the run's directory could not be made, or a job holds it."""
    if path.exists() and is_held(open_folder(path), LOCK):
        log.warning("another job holds %s now: a training would be refused", path)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(
            f"run_dir = {str(path)!r} cannot be written: {there} is no folder of yours; give "
            "another run_dir"
        )
