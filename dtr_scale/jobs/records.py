"""Keep what a run leaves: journal, MLflow, progress, skipped updates and status, by rank 0."""

import contextlib
import logging
import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial

from dtr_scale.config.load import resolved
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import UnsavedError, failure_reason
from dtr_scale.evaluation.flops import LayerCost
from dtr_scale.jobs.banner import place_of, tell_start
from dtr_scale.jobs.description import attempt_facts
from dtr_scale.jobs.plan.compute import TRAINING_FORWARDS
from dtr_scale.jobs.plan.gpus import nominal_flops
from dtr_scale.jobs.tracking import build_system_metrics, build_tracker
from dtr_scale.tracking.attempts import ROLLED_BACK, begin_attempt, close_open_attempt, end_attempt
from dtr_scale.tracking.journal import Journal, Record, last_step
from dtr_scale.train.clock import GpuHours
from dtr_scale.train.evaluate import Result
from dtr_scale.train.health import Health, SlowRank
from dtr_scale.train.progress import Progress
from dtr_scale.train.run_dir import (
    SKIPPED,
    RunDirectory,
    goodput_of,
    write_saved_step,
    write_status,
)
from dtr_scale.train.skipped import SkipLog, SkippedStep
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)


class Records:
    """What rank 0 writes of a run: journal, tracker, progress, status; nothing on other ranks."""

    training: str | None = None
    """The id of a training that is tracked."""

    def count(self, step: int, seconds: float) -> None: ...

    def write(self, record: Record) -> None: ...

    def write_evaluation(self, result: Result) -> None: ...

    def write_skipped(self, step: SkippedStep) -> None: ...

    def begin_again(self, reason: str) -> None: ...

    def end(self, outcome: str, reason: str) -> None: ...


class _MainRecords(Records):
    def __init__(
        self,
        trainer: Trainer,
        experiment: Experiment,
        world: World,
        run_dir: RunDirectory,
        cost: LayerCost | None,
        hosts: list[str],
        launched: datetime,
    ) -> None:
        self._trainer, self._experiment, self._world = trainer, experiment, world
        self._run_dir, self._cost, self._hosts = run_dir, cost, hosts
        self._path = run_dir.path
        run_dir.write_config(resolved(experiment))
        write_status(run_dir.path, "running", step=trainer.step)
        if run_dir.journal.exists():
            # Before the journal is opened, which is the last that the job before has written.
            close_open_attempt(
                run_dir.path,
                run_dir.status_before,
                run_dir.journal.stat().st_mtime,
                last_step=last_step(run_dir.journal),
                # What this job goes on from is what counts of the one before.
                measure=partial(goodput_of, run_dir.path, trainer.step),
            )
        # Before a bar is drawn, beside which lines come one by one.
        tell_start(experiment, place_of(trainer, hosts), cost)
        self._begin(launched)
        # A journal never ends before its checkpoint, and status.json knows of every checkpoint: a
        # start that misses it is refused.
        trainer.checkpoints.before_commit = lambda: self._journal.sync()
        trainer.checkpoints.on_saved = self._note_saved
        self._health = _health(experiment, world, cost)
        self._slow_rank = SlowRank(hosts)

    def _begin(self, launched: datetime) -> None:
        """Open everything at the step where the run stands; records of later ones are dropped."""
        trainer, world, path = self._trainer, self._world, self._path
        step, journal = trainer.step, self._run_dir.journal
        self._journal = Journal(journal, step=step)
        self._skipped = SkipLog(path / SKIPPED, step=step, salt=trainer.guard.rollbacks)
        facts = attempt_facts(world.world_size, self._hosts, world.device.type)
        self._attempt = begin_attempt(
            path, step=step, launched=launched, job=self._run_dir.job, **facts
        )
        self._gpu_hours = GpuHours(journal, trainer.state.samples_seen, world.world_size)
        self._tracker, self.training = build_tracker(
            self._experiment, world, self._run_dir, trainer, self._cost
        )
        self._progress = Progress(
            step=step, max_steps=trainer.max_steps, batch_size=trainer.global_batch_size
        )

    def count(self, step: int, seconds: float) -> None:
        self._progress.count(step, seconds)

    def write(self, record: Record) -> None:
        record = self._health.added_to(self._gpu_hours.added_to(record))
        self._slow_rank.look(record)
        # The journal is the record of a run; MLflow is its mirror and may be away.
        self._journal.write(record)
        self._tracker.log(record)
        self._progress.show(record)

    def write_evaluation(self, result: Result) -> None:
        checkpoints = self._trainer.checkpoints
        checkpoints.note(result.step, result.figures)  # for checkpoint.keep_best
        if result.metric in result.figures:
            value = result.figures[result.metric]
            checkpoints.rank(result.step, value, result.metric, result.settings)
        self._tracker.look()

    def write_skipped(self, step: SkippedStep) -> None:
        self._skipped.write(step)

    def begin_again(self, reason: str) -> None:
        """End the attempt that is given up, and begin another one at the checkpoint."""
        log.warning(
            "%s; going back to step %d, with other draws from there", reason, self._trainer.step
        )
        # The journal has the steps that are given up; the state has gone back before them.
        self.close(ROLLED_BACK, reason, step=last_step(self._run_dir.journal))
        self._begin(datetime.now(UTC))
        write_status(self._path, "running", step=self._trainer.step)

    def end(self, outcome: str, reason: str) -> None:
        """Write how the run ended, first of all where launch scripts look for it.

        UnsavedError if that, or the journal's last records, cannot be written.
        """
        try:
            self._journal.close()
            write_status(
                self._path,
                outcome,
                step=self._trainer.step,
                saved_step=self._trainer.saved_step,
                reason=reason,
            )
        except OSError as error:
            raise UnsavedError(
                f"the end of the run cannot be written to {self._path}: {error.strerror}; make "
                f"room and start it again; it has a checkpoint of step {self._trainer.saved_step}"
            ) from None
        self.close(outcome, reason)
        checkpoint = None
        if self._trainer.saved_step is not None:
            checkpoint = self._trainer.checkpoints.url(self._trainer.saved_step)
        told = f"leaving on request ({reason})" if reason else outcome
        # An expert draws nothing by itself.
        is_last = outcome == "finished" and not self._path.name.startswith("expert_")
        further = f"; next: dtr-scale sample {shlex.quote(str(self._path))}" if is_last else ""
        log.info(
            "%s at step %d; checkpoint %s%s",
            told, self._trainer.step, checkpoint or "none yet", further,
        )  # fmt: skip

    def close(self, outcome: str, reason: str, *, step: int | None = None) -> None:
        self._progress.close()
        with contextlib.suppress(OSError):  # told already, when its records were kept in memory
            self._journal.close()
        step, now = step or self._trainer.step, datetime.now(UTC)
        goodput = goodput_of(self._path, self._trainer.saved_step, now, outcome, step)
        end_attempt(
            self._path,
            self._attempt,
            outcome=outcome,
            reason=reason,
            step=step,
            time=now,
            goodput=goodput,
        )
        # Last: it may wait for a server, and all that it sends is on disk.
        self._tracker.finish()

    def _note_saved(self, step: int) -> None:
        write_saved_step(self._path, step)
        self._tracker.look()


def _health(experiment: Experiment, world: World, cost: LayerCost | None) -> Health:
    model = experiment.model
    return Health(
        device=world.device,
        world_size=world.world_size,
        flops_per_sample=2 * TRAINING_FORWARDS * cost.macs if cost else None,
        peak_flops=nominal_flops(world.device, experiment.engine.precision),
        tokens_per_sample=model.num_tokens if model.type == "dit" else 0,
    )


@contextmanager
def open_records(
    trainer: Trainer,
    experiment: Experiment,
    world: World,
    run_dir: RunDirectory | None,
    cost: LayerCost | None,
    launched: datetime,
) -> Iterator[Records]:
    """Open rank 0's records, with one verdict for all ranks; close them if the run fails."""
    records = Records()
    hosts = world.all_gather_object(socket.gethostname())
    with world.agree():
        if run_dir:
            records = _MainRecords(trainer, experiment, world, run_dir, cost, hosts, launched)
    # On every rank, for its node: each finds the MLflow run by the training's id.
    build_system_metrics(experiment, world, world.broadcast_object(records.training))
    try:
        yield records
    except BaseException as error:
        if isinstance(records, _MainRecords):
            records.close("failed", failure_reason(error))
        raise
