"""Build what mirrors a run's journal in MLflow, as its experiment asks."""

import socket

import torch

import dtr_scale
from dtr_scale.config.changes import flatten
from dtr_scale.config.load import resolved
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.tracking.base import NullTracker, Tracker
from dtr_scale.train.run_dir import RunDirectory


def check_tracking(experiment: Experiment) -> None:
    """Raise ConfigError if the experiment's MLflow can never be reached."""
    if experiment.tracking.type == "mlflow":
        from dtr_scale.tracking.check import check_uri

        check_uri(experiment.tracking.uri)


def build_tracker(
    experiment: Experiment, world: World, run_dir: RunDirectory, *, step: int
) -> Tracker:
    """Return what mirrors rank 0's journal from `step` on, as the experiment asks."""
    tracking = experiment.tracking
    if tracking.type == "none":
        return NullTracker()
    from dtr_scale.tracking.mirror import MlflowTracker
    from dtr_scale.tracking.mlflow import RunInfo
    from dtr_scale.tracking.uri import tracking_uri

    run = RunInfo(
        run_dir=run_dir.path,
        journal=run_dir.journal,
        uri=tracking_uri(tracking.uri, run_dir.path),
        experiment=tracking.experiment,
        name=experiment.name,
        params=flatten(resolved(experiment)),
        tags={
            "dtr_scale.version": dtr_scale.__version__,
            "torch.version": torch.__version__,
            "world_size": str(world.world_size),
            "device": str(world.device.type),
            "host": socket.gethostname(),
            "run_dir": str(run_dir.path.resolve()),
        },
        step=step,
    )
    return MlflowTracker(run)
