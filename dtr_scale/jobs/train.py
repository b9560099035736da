"""One job of a run: take the directory, go on from its checkpoint, train, write how it ended."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial

from dtr_scale.config.load import resolved
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.peers import Failure, PeerWatch, end_at_exit
from dtr_scale.engines.stacks import STACKS, Stacks
from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import ConfigError, DtrScaleError, PeerError, UnsavedError
from dtr_scale.evaluation.flops import LayerCost
from dtr_scale.heartbeat import Heartbeat
from dtr_scale.jobs.alike import refuse_other_settings
from dtr_scale.jobs.banner import place_of, tell_start
from dtr_scale.jobs.bench.report import nominal_flops
from dtr_scale.jobs.build import build_trainer
from dtr_scale.jobs.description import attempt_facts, network_cost
from dtr_scale.jobs.in_training import build_evaluation
from dtr_scale.jobs.plan.compute import TRAINING_FORWARDS
from dtr_scale.jobs.resume import resume_or_start
from dtr_scale.jobs.tracking import build_system_metrics, build_tracker, check_tracking
from dtr_scale.launchers import launched_rank, launched_world_size
from dtr_scale.signals import LeaveRequest
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
    write_failure,
    write_saved_step,
    write_status,
)
from dtr_scale.train.skipped import SkipLog, SkippedStep
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)

EXIT_FINISHED, EXIT_FAILED, EXIT_REQUEUE = 0, 1, 75
_PEER_SECONDS = 5.0


def train_experiment(
    experiment: Experiment, heartbeat: Heartbeat | None = None, leave: LeaveRequest | None = None
) -> int:
    """Run an experiment to its end or to a request to leave; return the exit code.

    0: finished; 75: checkpointed, start it again to go on. The run directory's status.json tells
    the same, since launchers replace exit codes. Errors are raised. The caller keeps `heartbeat`
    beating, which is told here of each step, and `leave` listening; without one it is made here.
    """
    heartbeat = heartbeat or Heartbeat()
    with ExitStack() as stack:
        if leave is None:
            leave = LeaveRequest()
            # First of all: a request that comes while everything is built is heard, too.
            stack.enter_context(leave.listening())
        world = join(experiment)
        refuse_other_settings(world, experiment)
        cost = None
        with world.agree():
            # Before the run directory is made, which a wrong address would leave behind.
            if world.is_main:
                check_tracking(experiment)
                # Before the engine is built, which may change how layers compute.
                cost = network_cost(experiment)
        # Left in reverse: what writes to the run directory is closed before its lease is given up.
        run_dir = stack.enter_context(_run_directory(experiment, world, heartbeat))
        job = world.broadcast_object(run_dir.job if run_dir else None)
        fail = partial(write_failure, experiment.run_path, job=job)
        # Before the parts are built: a rank may fail there while the others wait in a collective.
        told = partial(_tell_of_peer, fail)
        peers = PeerWatch(world, end=partial(_end_with_peer, heartbeat), told=told)
        stacks = Stacks(experiment.run_path / STACKS, world.rank)
        stack.callback(stacks.close)
        stack.enter_context(_failures_told(fail, peers))
        trainer = build_trainer(experiment, world)
        stack.callback(trainer.loader.close)
        stack.callback(trainer.checkpoints.close)
        # Before a run begins, or an earlier one is set aside: it may be refused.
        evaluate = build_evaluation(experiment, trainer, run_dir, lambda: leave.reason)
        resume_or_start(trainer, experiment, world, run_dir)
        told = (trainer, experiment, world, run_dir, cost, leave.launched)
        records = stack.enter_context(_records(*told))
        # After an earlier run was set aside, with its stacks.
        peers.follow(trainer.place, stacks)
        # Before the first step: its compilation takes minutes, which a lost node may not have.
        reason = next(filter(None, world.all_gather_object(leave.reason)), None)
        # From here on a time limit counts: each start takes the run a step further.
        leave.enter_loop(experiment.train.max_minutes, asked=heartbeat.moved)
        if evaluate and not reason:
            evaluate.on_result = records.write_evaluation
            # The last job may have been killed, or asked to leave, after it saved and before this.
            if evaluate.is_due_again(trainer.step) and trainer.evaluation_is_due:
                reason = evaluate.make_up(trainer.step)
        reason = reason or trainer.run(
            leave,
            log=records.write,
            evaluate=evaluate,
            on_step=records.count,
            on_skip=records.write_skipped,
            on_rollback=records.begin_again,
        )
        records.end("preempted" if reason else "finished", reason or "")
        # The ranks wait here until rank 0 has written the end, still watched: if that fails, they
        # end with its exit code instead of 0.
        world.barrier()
        peers.close()
    # Not after an error: the other ranks may be waiting in a collective, or gone.
    world.leave()
    return EXIT_REQUEUE if reason else EXIT_FINISHED


class _Records:
    """What rank 0 writes of a run: journal, tracker, progress, status; nothing on other ranks."""

    training: str | None = None
    """The id of a training that is tracked."""

    def count(self, step: int, seconds: float) -> None: ...

    def write(self, record: Record) -> None: ...

    def write_evaluation(self, result: Result) -> None: ...

    def write_skipped(self, step: SkippedStep) -> None: ...

    def begin_again(self, reason: str) -> None: ...

    def end(self, outcome: str, reason: str) -> None: ...


class _MainRecords(_Records):
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
        log.info("%s at step %d; checkpoint %s", told, self._trainer.step, checkpoint or "none yet")

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
def _records(
    trainer: Trainer,
    experiment: Experiment,
    world: World,
    run_dir: RunDirectory | None,
    cost: LayerCost | None,
    launched: datetime,
) -> Iterator[_Records]:
    """Open rank 0's records, with one verdict for all ranks; close them if the run fails."""
    records = _Records()
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


def join(experiment: Experiment) -> World:
    """Return this rank's place among those that the launcher started for an experiment."""
    world_size = launched_world_size()
    if experiment.engine.type == "single" and world_size > 1:
        raise ConfigError(
            f"engine.type = 'single' runs in one process, the launcher started {world_size}; "
            "use --engine.type=deepspeed, fsdp2 or flat, or start one process"
        )
    engine = experiment.engine
    needs_process_group = engine.type in ("deepspeed", "fsdp2")
    return join_world(needs_process_group=needs_process_group, device=engine.device)


@contextmanager
def _run_directory(
    experiment: Experiment, world: World, heartbeat: Heartbeat
) -> Iterator[RunDirectory | None]:
    """Hold the run directory on rank 0; the other ranks know that it is held."""
    run_dir: RunDirectory | None = None
    with world.agree():
        if world.is_main:
            # One rank holds the lease; `agree` carries a refusal to the others.
            lost = partial(_end_without_a_trace, heartbeat)
            run_dir = RunDirectory(experiment.run_path, lost=lost)
    refused = False
    try:
        yield run_dir
    except DtrScaleError as error:
        # A start that is refused leaves no trace: the directory removes what it has made.
        refused = error.exit_code == ConfigError.exit_code
        raise
    finally:
        if run_dir:
            run_dir.close(refused=refused)


@contextmanager
def _failures_told(fail: Callable[[str], bool], peers: PeerWatch) -> Iterator[None]:
    """Let the rank that failed tell status.json and its peers why; what breaks after is no news.

    When a rank is gone, the collectives of the others fail with errors that explain nothing.
    """
    try:
        yield
    except BaseException as error:
        # A collective that lost a peer raises a RuntimeError. It may come before the peer's own
        # reason has reached the store, hence the wait.
        if isinstance(error, RuntimeError) and (failure := peers.wait_for_failure(_PEER_SECONDS)):
            ended = PeerError(f"another rank failed: {failure.reason}")
            ended.exit_code = failure.exit_code
            ended.reported = True  # by the watch
            end_at_exit(ended.exit_code)
            raise ended from None
        reason = failure_reason(error)
        # What `agree` has raised on every rank is told by rank 0 alone.
        if launched_rank() == 0 or not getattr(error, "on_every_rank", False):
            fail(reason)  # before the peers know, who would tell it otherwise
        exit_code = getattr(error, "exit_code", EXIT_FAILED)
        peers.post(reason, exit_code)
        # Threads of the watch may be in C++ while Python shuts down, which aborts with -6.
        if launched_world_size() > 1:
            end_at_exit(exit_code)
        raise


def failure_reason(error: BaseException) -> str:
    """Return an error in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def _end_without_a_trace(heartbeat: Heartbeat, message: str) -> None:
    """End this process, whose folders are another job's by now: nothing more is written there."""
    # `os._exit`, since handlers that run at a usual exit would still write there.
    log.error(message)
    heartbeat.stop()
    os._exit(EXIT_FAILED)


def _tell_of_peer(fail: Callable[[str], bool], failure: Failure) -> None:
    """Tell of a failure at once: it may be seconds until the main thread knows."""
    if fail(failure.reason) or launched_rank() == 0:
        log.error("another rank failed: %s", failure.reason)


def _end_with_peer(heartbeat: Heartbeat, failure: Failure) -> None:
    """End this process, which still waits for a rank that has failed."""
    heartbeat.stop()
    # Nothing else ends a main thread that is inside a collective.
    os._exit(failure.exit_code)
