"""One job of a run: take the directory, go on from its checkpoint, train, write how it ended."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from dtr_scale.config.load import changed_identity, resolved
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World, join_world, launched_world_size
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.tracking.base import NullTracker
from dtr_scale.tracking.journal import Journal, Record
from dtr_scale.train.build import build_evaluation, build_tracker, build_trainer
from dtr_scale.train.progress import Progress
from dtr_scale.train.run_dir import RunDirectory
from dtr_scale.train.signals import LeaveRequest
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)

EXIT_FINISHED, EXIT_REQUEUE = 0, 75


def train_experiment(experiment: Experiment) -> int:
    """Run an experiment to its end or to a request to leave; return the exit code.

    0: finished; 75: checkpointed, start it again to go on. The run directory's status.json tells
    the same, since launchers replace exit codes. Errors are raised.
    """
    leave = LeaveRequest()
    with ExitStack() as stack:
        stack.enter_context(leave.listening())
        world = _join(experiment)
        run_dir = stack.enter_context(_run_directory(experiment, world))
        trainer = build_trainer(experiment, world)
        stack.callback(trainer.loader.close)
        _take_up(trainer, experiment, world, run_dir)
        reason = _run(trainer, experiment, world, run_dir, leave)
        world.barrier()
    # Not after an error: the other ranks may be waiting in a collective, or gone.
    world.leave()
    return EXIT_REQUEUE if reason else EXIT_FINISHED


def _join(experiment: Experiment) -> World:
    world_size = launched_world_size()
    if experiment.engine.type == "single" and world_size > 1:
        raise ConfigError(
            f"engine.type = 'single' runs in one process, the launcher started {world_size}; "
            "use --engine.type=deepspeed or start one process"
        )
    return join_world(needs_process_group=experiment.engine.type == "deepspeed")


def _take_up(
    trainer: Trainer, experiment: Experiment, world: World, run_dir: RunDirectory | None
) -> None:
    """Go on from the newest checkpoint, or start afresh where there is none or it is wanted."""
    if experiment.checkpoint.resume == "never":
        with world.agree():
            if run_dir and (place := run_dir.set_aside()):
                log.info("fresh start: the earlier run was moved to %s", place)
            if world.is_main and trainer.checkpoints.steps():
                raise CheckpointError(
                    f"checkpoint.resume = 'never', but {experiment.checkpoint.dir} holds "
                    "checkpoints; choose an empty checkpoint.dir"
                )
        return
    meta = trainer.resume()
    if meta is None:
        return
    _refuse_another_run(meta, trainer.meta, trainer.checkpoints.url(trainer.step))
    log.info("resumed %s at step %d", trainer.checkpoints.url(trainer.step), trainer.step)


def _refuse_another_run(stored: dict[str, Any], wanted: dict[str, Any], url: str) -> None:
    """Raise ConfigError if what defines a run is not what the checkpoint was made with."""
    differences = changed_identity(stored["config"], wanted["config"])
    if stored["manifest_hash"] != wanted["manifest_hash"]:
        differences.append(("data.shards' manifest", stored["manifest_hash"][:12], "another"))
    if differences:
        listed = ", ".join(f"{key} was {old!r} and is {new!r}" for key, old, new in differences)
        raise ConfigError(
            f"{url} belongs to another run: {listed}; set that back, choose another run_dir, or "
            "start afresh with --checkpoint.resume=never"
        )


def _run(
    trainer: Trainer,
    experiment: Experiment,
    world: World,
    run_dir: RunDirectory | None,
    leave: LeaveRequest,
) -> str | None:
    """Train with journal, tracker and progress on rank 0, and without on the others."""
    if run_dir is None:
        evaluate = build_evaluation(experiment, trainer, None, NullTracker())
        return trainer.run(leave, log=lambda record: None, evaluate=evaluate)
    run_dir.write_config(resolved(experiment))
    run_dir.write_status("running", step=trainer.step)
    journal = Journal(run_dir.journal, step=trainer.step)
    tracker = build_tracker(experiment, world, run_dir)
    progress = Progress(step=trainer.step, max_steps=trainer.max_steps)

    def record_step(record: Record) -> None:
        journal.write(record)
        tracker.log(record)
        progress.show(record)

    outcome = "failed"
    try:
        evaluate = build_evaluation(experiment, trainer, run_dir, tracker)
        reason = trainer.run(leave, log=record_step, evaluate=evaluate)
        outcome = "preempted" if reason else "finished"
        # First of all: a scheduler's patience may end while MLflow is brought up to date.
        run_dir.write_status(outcome, step=trainer.step, reason=reason or "")
    finally:
        progress.close()
        journal.close()
        saved = trainer.saved_step
        tracker.finish(outcome, None if saved is None else trainer.checkpoints.url(saved))
    log.info(
        "%s at step %d; checkpoint %s",
        f"leaving on request ({reason})" if reason else "finished",
        trainer.step,
        trainer.checkpoints.url(trainer.step),
    )
    return reason


@contextmanager
def _run_directory(experiment: Experiment, world: World) -> Iterator[RunDirectory | None]:
    """Hold the run directory on rank 0; the other ranks know that it is held.

    What ends the block with an error goes into status.json.
    """
    run_dir: RunDirectory | None = None
    with world.agree():
        if world.is_main:
            run_dir = RunDirectory(experiment.run_path)
    try:
        yield run_dir
    except BaseException as error:
        if run_dir:
            reason = str(error).partition("\n")[0] or type(error).__name__
            run_dir.write_status("failed", reason=reason)
        raise
    finally:
        if run_dir:
            run_dir.close()
