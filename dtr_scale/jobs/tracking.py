"""Build what mirrors a run in MLflow, as its experiment asks, and bring it up to date later."""

import json
import logging
import re
import secrets
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from dtr_scale.checkpoint.catalog import Catalog
from dtr_scale.checkpoint.lease import Lease, is_held
from dtr_scale.config.load import load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError, DtrScaleError, TrackingError
from dtr_scale.evaluation.flops import LayerCost
from dtr_scale.jobs import description
from dtr_scale.logs import without_password
from dtr_scale.storage.folder import Folder, open_folder
from dtr_scale.tracking.base import NullTracker, Tracker, Trackers
from dtr_scale.tracking.description import DESCRIPTION, Description, RunInfo, read_description
from dtr_scale.tracking.prometheus import PrometheusFile
from dtr_scale.tracking.uri import artifact_home, runs_page, shown_uri, tracking_uri
from dtr_scale.train.run_dir import CHECKPOINTS, CONFIG, JOURNAL, LOCK, TRAINING, RunDirectory
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)

_TRAINING_ID = re.compile(r"[\w.-]{1,64}")


def check_tracking(experiment: Experiment) -> None:
    """Raise ConfigError if the experiment's MLflow can never be reached."""
    if experiment.tracking.type != "none":
        from dtr_scale.tracking.check import check_uri

        check_uri(experiment.tracking.uri)


def build_tracker(
    experiment: Experiment,
    world: World,
    run_dir: RunDirectory,
    trainer: Trainer,
    cost: LayerCost | None,
) -> tuple[Tracker, str | None]:
    """Return what mirrors rank 0's run directory, and the training's id, as the experiment asks."""
    tracker, training = _mlflow_tracker(experiment, world, run_dir, trainer, cost)
    if not experiment.tracking.prometheus:
        return tracker, training
    file = PrometheusFile(
        run_dir.path,
        experiment.name,
        max_steps=trainer.max_steps,
        saved_step=lambda: trainer.saved_step,
    )
    # The file first: MLflow's end may take a while.
    return Trackers([file, tracker]), training


def _mlflow_tracker(
    experiment: Experiment,
    world: World,
    run_dir: RunDirectory,
    trainer: Trainer,
    cost: LayerCost | None,
) -> tuple[Tracker, str | None]:
    if experiment.tracking.type == "none":
        return NullTracker(), None
    from dtr_scale.tracking.mirror import MlflowTracker

    samples, ranks = trainer.loader.samples, world.world_size
    told = Description(
        training=_training_id(trainer.checkpoints.folder),
        experiment=experiment.tracking.experiment,
        name=experiment.name,
        step=trainer.step,
        params=description.params(
            experiment, samples=sum(samples.shard_samples), ranks=ranks, cost=cost
        ),
        tags=description.tags(
            experiment, ranks=ranks, device=world.device.type, run_dir=run_dir.path
        ),
        expected=experiment.expected,
        dataset=description.dataset(experiment, samples.manifest),
        data=description.data_summary(samples.manifest),
    )
    told.write(run_dir.path)
    info = _run_info(experiment, run_dir.path, told, trainer.checkpoints.folder)
    return MlflowTracker(info), told.training


def build_system_metrics(experiment: Experiment, world: World, training: str | None) -> None:
    """Show how busy this node is, from one rank of it, where the run is tracked as `training`."""
    uri = tracking_uri(experiment.tracking.uri, experiment.run_path)
    is_server = uri.startswith(("http:", "https:"))
    # A sqlite file takes one writer, and may be on a disk that other nodes lock badly.
    if training is None or world.local_rank or not (is_server or world.is_main):
        return
    from dtr_scale.tracking.system import SystemMetrics

    told = Description(training, experiment.tracking.experiment, experiment.name, step=0)
    SystemMetrics(_run_info(experiment, experiment.run_path, told, None))


def sync_run(run_dir: Path, uri: str | None = None) -> str:
    """Send what MLflow does not have of a run that no job holds; return where it is.

    ConfigError if there is no such run or a job holds it, TrackingError if MLflow is away.
    """
    from dtr_scale.tracking.check import check_uri
    from dtr_scale.tracking.mirror import reason_of, send_all

    check_uri(uri)
    info = _info_of(run_dir, uri)
    lease = Lease(
        open_folder(run_dir), LOCK, key="run_dir", run_dir=run_dir, lost=lambda told: None
    )
    lease.take()
    try:
        return f"{shown_uri(info.uri)}: run {send_all(info)}"
    except DtrScaleError:
        raise
    except Exception as error:  # of requests, SQLAlchemy, MLflow
        reason = reason_of(error, info.uri)
        raise TrackingError(
            f"MLflow at {shown_uri(info.uri)}: {reason}; {run_dir} keeps all: try again when it "
            "answers, or give another by --uri"
        ) from None
    finally:
        lease.release()


def link_of_run(run_dir: Path, uri: str | None = None) -> str:
    """Return where MLflow shows the runs of a run's experiment, and what serves it if need be.

    ConfigError if there is no such run, or if MLflow has nothing of it or does not answer.
    """
    from dtr_scale.tracking.check import check_uri
    from dtr_scale.tracking.history import History

    check_uri(uri)
    info = _info_of(run_dir, uri)
    name = info.description.experiment
    found = History(info.uri, run_dir).experiment_id(name)
    if found is None:
        raise ConfigError(
            f"MLflow at {shown_uri(info.uri)} has no experiment {name!r}; send it by "
            f"dtr-scale tracking sync {run_dir}"
        )
    return runs_page(info.uri, found, run_dir)


def send_findings(run_dir: Path) -> None:
    """Send what a command has found about a run, within reason; the next start sends the rest."""
    if not (run_dir / DESCRIPTION).exists():
        return  # it is not tracked
    if is_held(open_folder(run_dir), LOCK):
        log.info("MLflow gets it from the job that holds %s", run_dir)
        return
    from dtr_scale.tracking.mirror import MlflowTracker

    try:
        MlflowTracker(_info_of(run_dir, None)).finish()
    except DtrScaleError as error:
        log.warning("MLflow is not told: %s", error)


def _info_of(run_dir: Path, uri: str | None) -> RunInfo:
    """Return how to mirror a run directory, as its own files tell."""
    told = read_description(run_dir)
    # The directory may have been moved since the run wrote its own path down.
    experiment = load_experiment(run_dir / CONFIG, [f"--run_dir={run_dir}"])
    if uri is not None:
        tracking = experiment.tracking.model_copy(update={"uri": uri})
        experiment = experiment.model_copy(update={"tracking": tracking})
    place = experiment.checkpoint.dir or str(run_dir / CHECKPOINTS)
    options = experiment.data.storage_options if experiment.checkpoint.dir else None
    return _run_info(experiment, run_dir, told, open_folder(place, options))


def _run_info(
    experiment: Experiment, run_dir: Path, told: Description, folder: Folder | None
) -> RunInfo:
    uri = tracking_uri(experiment.tracking.uri, run_dir)
    return RunInfo(
        run_dir=run_dir,
        journal=run_dir / JOURNAL,
        uri=uri,
        home=artifact_home(uri, run_dir),
        description=told,
        checkpoints=partial(_kept, folder) if folder else dict,
    )


def _kept(folder: Folder) -> Mapping[int, str]:
    catalog = Catalog(folder)
    urls = {step: catalog.url(step) for step in catalog.steps()}
    if folder.is_local:
        return {step: str(Path(url).absolute()) for step, url in urls.items()}
    return {step: without_password(url) for step, url in urls.items()}


def _training_id(folder: Folder) -> str:
    """Return the id that is kept with the checkpoints, a new one where there is none yet."""
    try:
        training = str(folder.read_json(TRAINING)["training"])
        # MLflow is asked for it in a filter, which a quotation mark would leave.
        if _TRAINING_ID.fullmatch(training):
            return training
        log.warning("%s/%s names no training; it is written anew", folder.url, TRAINING)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    except OSError as error:
        log.warning("%s/%s cannot be read: %s", folder.url, TRAINING, error)
        return secrets.token_hex(8)
    training = secrets.token_hex(8)
    try:
        folder.write_bytes(TRAINING, json.dumps({"training": training}).encode() + b"\n")
    except OSError as error:
        log.warning("%s/%s cannot be written: %s", folder.url, TRAINING, error)
    return training
