"""Go on with a run, if its checkpoint is this run's, or start it."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dtr_scale.checkpoint.layout import kind_of
from dtr_scale.checkpoint.reader import CheckpointReader, LoadPlan
from dtr_scale.config.changes import Change, changes
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.jobs.attention import settle_attention
from dtr_scale.jobs.start import open_start
from dtr_scale.launchers import launch_name, restart_count
from dtr_scale.tracking.journal import last_step
from dtr_scale.train.run_dir import TRAINING, RunDirectory
from dtr_scale.train.state import compare_probes
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)

_LOGGED = ("world_size", "torch", "version")
"""What a checkpoint's meta tells of the job that wrote it, besides its config."""


def resume_or_start(
    trainer: Trainer, experiment: Experiment, world: World, run_dir: RunDirectory | None
) -> None:
    """Go on from the newest checkpoint, or start where there is none or it is not wanted.

    ConfigError if the checkpoint is of another run and `checkpoint.allow_changes` does not name
    what differs.
    """
    trainer.checkpoints.check_folder()
    with world.agree():
        # The run directory's lease says nothing of a checkpoint.dir that another machine uses.
        if run_dir:
            run_dir.hold_checkpoints(trainer.checkpoints.folder)
    if experiment.checkpoint.resume == "never" and not _has_begun(world, run_dir):
        with world.agree():
            _set_aside(trainer, experiment, run_dir)
    elif go_on(trainer, experiment, run_dir):
        return
    else:
        with world.agree():
            _refuse_to_forget(trainer, run_dir)
    settle_attention(trainer, experiment, stored=None)
    if experiment.checkpoint.start_from:
        trainer.start(partial(open_start, experiment))


def _has_begun(world: World, run_dir: RunDirectory | None) -> bool:
    """Tell all ranks whether this launch has begun its run afresh, in a start before this one.

    A job that comes back after a requeue means the run that it has begun, not the one before.
    """
    # torchrun counts a restart on the node alone whose rank has failed.
    is_restart = any(world.all_gather_object(restart_count()))
    begun = False
    if run_dir and is_restart:
        begun = run_dir.checkpoint_lease.begun_by == launch_name()
    elif run_dir:
        run_dir.checkpoint_lease.begun_by = None  # by another launch, whatever its name
    return world.broadcast_object(begun)


def go_on(trainer: Trainer, experiment: Experiment, run_dir: RunDirectory | None) -> bool:
    """Go on from the newest checkpoint; False if there is none."""
    allowed = experiment.checkpoint.allow_changes
    # The plan is made before a tensor is read: a refused checkpoint changes nothing.
    plan = trainer.resume(
        partial(_plan, meta=trainer.meta, averages=trainer.ema.keys, allowed=allowed)
    )
    if plan is None:
        return False
    log.info("resumed %s at step %d", plan.reader.url, trainer.step)
    # Before the probe, which is computed as the steps after it.
    settle_attention(trainer, experiment, plan.reader.meta.get("attention"))
    _check_probe(trainer, plan.reader, lenient=bool(allowed))
    for change in plan.changes:
        log.info("since then: %s", change)
    if run_dir:
        _tell_of_gap(run_dir.journal, plan.reader)
    return True


def _tell_of_gap(journal: Path, reader: CheckpointReader) -> None:
    """Warn where the journal ends before the checkpoint: a disk lost what it had been given."""
    # The journal has a record at each multiple of log_every, the config's of then.
    step, every = reader.meta["step"], reader.meta["config"]["train"]["log_every"]
    expected, found = step - step % every, last_step(journal)
    if found < expected:
        log.warning(
            "%s ends at step %d and the checkpoint is of step %d: the records of steps %d to %d "
            "are lost; training goes on, and a copy of the journal put there first fills the gap",
            journal,
            found,
            step,
            found + 1,
            expected,
        )


def _plan(
    reader: CheckpointReader, *, meta: dict[str, Any], averages: list[str], allowed: Sequence[str]
) -> LoadPlan:
    """Return what a run of `meta` takes of a checkpoint; ConfigError if that is another run's."""
    changes = _changes(reader.meta, meta, reader.url)
    refused = [c for c in changes if c.identity and c.key not in allowed]
    if refused:
        keys = ",".join(change.key for change in refused)
        raise ConfigError(
            f"{reader.url} belongs to another run: {', '.join(map(str, refused))}; set that back, "
            "choose another run_dir, start afresh with --checkpoint.resume=never, or go on "
            f"all the same with --checkpoint.allow_changes={keys}"
        )
    told = [f"{c}, by checkpoint.allow_changes" if c.identity else str(c) for c in changes]
    stored = {kind_of(key) for key in reader.shapes}
    fresh = [key for key in averages if key not in stored]
    # An average that was added later has no history to load.
    told += [f"the average {key} is new and begins at the weights" for key in sorted(fresh)]
    # The log-variances of other clusters, or of none, say nothing about these.
    if any(c.identity and c.key.startswith("objective.") for c in changes):
        fresh.append("objective")
    return LoadPlan(reader, fresh, told)


def _refuse_to_forget(trainer: Trainer, run_dir: RunDirectory | None) -> None:
    """Raise CheckpointError where a run that has been saved would begin again unasked."""
    if run_dir and run_dir.saved_step is not None:
        raise CheckpointError(
            f"{run_dir.path} was saved at step {run_dir.saved_step}, but there is no checkpoint in "
            f"{trainer.checkpoints.folder_url}; bring it back or set checkpoint.dir right, or "
            "start afresh on purpose with --checkpoint.resume=never"
        )


def _check_probe(trainer: Trainer, reader: CheckpointReader, *, lenient: bool) -> None:
    """Compare the next samples and their loss with what was stored; CheckpointError if they differ.

    `lenient` where something may be changed on purpose, which changes them too.
    """
    stored, found = reader.meta.get("probe"), trainer.probe()
    if stored is None or found is None:
        log.info("no probe loss to compare with")
        return
    precisions = {m["config"]["engine"]["precision"] for m in (reader.meta, trainer.meta)}
    # Ranks that share a matrix product may round differently, and must come to one verdict.
    with trainer.world.agree():
        try:
            log.info("%s", compare_probes(stored, found, precisions, reader.url))
        except CheckpointError as error:
            if not lenient:
                raise
            log.warning("%s (checkpoint.allow_changes)", error)


def _set_aside(trainer: Trainer, experiment: Experiment, run_dir: RunDirectory | None) -> None:
    """Move what the run directory holds out of the way of a fresh start."""
    if run_dir is None:
        return
    # What lies outside of the run directory is not moved: S3 has no renaming.
    if experiment.checkpoint.dir and trainer.checkpoints.steps():
        raise CheckpointError(
            f"checkpoint.resume = 'never', but {experiment.checkpoint.dir} holds checkpoints; "
            "choose an empty checkpoint.dir"
        )
    if place := run_dir.set_aside():
        log.info("fresh start: the earlier run was moved to %s", place)
    # Left by a run that has saved nothing: this one is another training.
    trainer.checkpoints.folder.remove(TRAINING)
    # After it: a start that ends before leaves it to the next one.
    run_dir.checkpoint_lease.tell_begun(launch_name())


def _changes(stored: dict[str, Any], wanted: dict[str, Any], url: str) -> list[Change]:
    found = changes(stored["config"], wanted["config"], source=url)
    found += [Change(k, stored[k], wanted[k]) for k in _LOGGED if stored[k] != wanted[k]]
    old, new = stored["manifest_hash"][:12], wanted["manifest_hash"][:12]
    if old != new:
        found.append(Change("data.shards", f"manifest {old}", f"manifest {new}", identity=True))
    return found
