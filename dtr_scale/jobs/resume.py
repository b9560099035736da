"""Going on with a run: from which checkpoint, and what may differ from when it was written."""

import logging
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.checkpoint.start import read_start
from dtr_scale.config.changes import Change, changes
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.train.probe import compare
from dtr_scale.train.run_dir import RunDirectory
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)

_LOGGED = ("world_size", "torch", "version")
"""What a checkpoint's meta tells of the job that wrote it, besides its config."""


def take_up(
    trainer: Trainer, experiment: Experiment, world: World, run_dir: RunDirectory | None
) -> None:
    """Go on from the newest checkpoint, or start afresh where there is none or it is wanted.

    ConfigError if the checkpoint is of another run and `checkpoint.allow_changes` does not name
    what differs.
    """
    trainer.checkpoints.probe()
    if experiment.checkpoint.dir:
        trainer.checkpoints.claim(str(experiment.run_path.absolute()))
    if experiment.checkpoint.resume == "never":
        with world.agree():
            _start_afresh(trainer, experiment, run_dir)
    elif _resume(trainer, experiment):
        return
    else:
        with world.agree():
            _refuse_to_forget(trainer, run_dir)
    if place := experiment.checkpoint.start_from:
        trainer.start(partial(read_start, Path(place), experiment.checkpoint.start_kind))
        log.info("starting from %s", place)


def _resume(trainer: Trainer, experiment: Experiment) -> bool:
    """Go on from the newest checkpoint; False if there is none."""
    found: list[Change] = []
    new_averages: set[str] = set()
    allowed = experiment.checkpoint.allow_changes

    def accept(reader: CheckpointReader) -> Collection[str]:
        url = reader.url
        found[:] = _changes(reader.meta, trainer.meta, url)
        refused = [c for c in found if c.identity and c.key not in allowed]
        if refused:
            keys = ",".join(change.key for change in refused)
            raise ConfigError(
                f"{url} belongs to another run: {', '.join(map(str, refused))}; set that back, "
                "choose another run_dir, start afresh with --checkpoint.resume=never, or go on "
                f"all the same with --checkpoint.allow_changes={keys}"
            )
        # The log-variances of other clusters, or of none, say nothing about these.
        another = any(c.identity and c.key.startswith("objective.") for c in found)
        kinds = {key.partition("/")[0] for key in reader.shapes}
        new_averages.clear()
        new_averages.update(key for key in trainer.ema.keys if key not in kinds)
        return [*new_averages, *(["objective"] if another else [])]

    meta = trainer.resume(accept)
    if meta is None:
        return False
    trainer.ema.load(meta.get("averages", {}), trainer.step, new_averages)
    url = trainer.checkpoints.url(trainer.step)
    log.info("resumed %s at step %d", url, trainer.step)
    _check_probe(trainer, meta, url, lenient=bool(allowed))
    for change in found:
        on_purpose = ", by checkpoint.allow_changes" if change.identity else ""
        log.info("since then: %s%s", change, on_purpose)
    for key in sorted(new_averages):
        log.info("since then: the average %s is new and begins at the weights", key)
    return True


def _refuse_to_forget(trainer: Trainer, run_dir: RunDirectory | None) -> None:
    """Raise CheckpointError where a run that has been saved would begin again unasked."""
    if run_dir and run_dir.saved_step is not None:
        raise CheckpointError(
            f"{run_dir.path} was saved at step {run_dir.saved_step}, but there is no checkpoint in "
            f"{trainer.checkpoints.folder_url}; bring it back or set checkpoint.dir right, or "
            "start afresh on purpose with --checkpoint.resume=never"
        )


def _check_probe(trainer: Trainer, meta: dict[str, Any], url: str, *, lenient: bool) -> None:
    """Compare the next samples and their loss with what was stored; CheckpointError if they differ.

    `lenient` where something may be changed on purpose, which changes them too.
    """
    stored, found = meta.get("probe"), trainer.probe()
    if stored is None or found is None:
        log.info("no probe loss to compare with")
        return
    precisions = {m["config"]["engine"]["precision"] for m in (meta, trainer.meta)}
    with trainer.world.agree():
        try:
            log.info("%s", compare(stored, found, precisions, url))
        except CheckpointError as error:
            if not lenient:
                raise
            log.warning("%s (checkpoint.allow_changes)", error)


def _start_afresh(trainer: Trainer, experiment: Experiment, run_dir: RunDirectory | None) -> None:
    if run_dir is None:
        return
    if experiment.checkpoint.dir and trainer.checkpoints.steps():
        raise CheckpointError(
            f"checkpoint.resume = 'never', but {experiment.checkpoint.dir} holds checkpoints; "
            "choose an empty checkpoint.dir"
        )
    if place := run_dir.set_aside():
        log.info("fresh start: the earlier run was moved to %s", place)


def _changes(stored: dict[str, Any], wanted: dict[str, Any], url: str) -> list[Change]:
    found = changes(stored["config"], wanted["config"], source=url)
    found += [Change(k, stored[k], wanted[k]) for k in _LOGGED if stored[k] != wanted[k]]
    old, new = stored["manifest_hash"][:12], wanted["manifest_hash"][:12]
    if old != new:
        found.append(Change("data.shards", f"manifest {old}", f"manifest {new}", identity=True))
    return found
