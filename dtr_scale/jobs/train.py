"""One job of a run: take the directory, go on from its checkpoint, train, write how it ended."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from dtr_scale.config.schema import Experiment
from dtr_scale.engines.peers import Failure, PeerWatch, end_at_exit
from dtr_scale.engines.stacks import STACKS, Stacks
from dtr_scale.engines.world import World, join_world
from dtr_scale.errors import ConfigError, DtrScaleError, PeerError, failure_reason
from dtr_scale.heartbeat import Heartbeat
from dtr_scale.jobs.alike import refuse_other_settings
from dtr_scale.jobs.build import build_trainer
from dtr_scale.jobs.description import network_cost
from dtr_scale.jobs.in_training import PeriodicEvaluation, build_evaluation
from dtr_scale.jobs.records import Records, open_records
from dtr_scale.jobs.resume import resume_or_start
from dtr_scale.jobs.tracking import check_tracking
from dtr_scale.launchers import launched_rank, launched_world_size
from dtr_scale.signals import LeaveRequest
from dtr_scale.train.run_dir import RunDirectory, write_failure
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
        records = stack.enter_context(open_records(*told))
        # After an earlier run was set aside, with its stacks.
        peers.follow(trainer.place, stacks)
        # Before the first step: its compilation takes minutes, which a lost node may not have.
        reason = next(filter(None, world.all_gather_object(leave.reason)), None)
        # From here on a time limit counts: each start takes the run a step further.
        leave.enter_loop(experiment.train.max_minutes, asked=heartbeat.moved)
        reason = reason or _make_steps(trainer, evaluate, records, leave)
        records.end("preempted" if reason else "finished", reason or "")
        # The ranks wait here until rank 0 has written the end, still watched: if that fails, they
        # end with its exit code instead of 0.
        world.barrier()
        peers.close()
    # Not after an error: the other ranks may be waiting in a collective, or gone.
    world.leave()
    return EXIT_REQUEUE if reason else EXIT_FINISHED


def _make_steps(
    trainer: Trainer, evaluate: PeriodicEvaluation | None, records: Records, leave: LeaveRequest
) -> str | None:
    """Train to the end, or to a request to leave, whose reason is returned."""
    reason: str | None = None
    if evaluate:
        evaluate.on_result = records.write_evaluation
        # The last job may have been killed, or asked to leave, after it saved and before this.
        if evaluate.is_due_again(trainer.step) and trainer.evaluation_is_due:
            reason = evaluate.make_up(trainer.step)
    return reason or trainer.run(
        leave,
        log=records.write,
        evaluate=evaluate,
        on_step=records.count,
        on_skip=records.write_skipped,
        on_rollback=records.begin_again,
    )


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
        exit_code = getattr(error, "exit_code", EXIT_FAILED)
        # What `agree` has raised on every rank is told by rank 0 alone.
        if launched_rank() == 0 or not getattr(error, "on_every_rank", False):
            fail(reason)  # before the peers know, who would tell it otherwise
            peers.post(reason, exit_code)
        # Threads of the watch may be in C++ while Python shuts down, which aborts with -6.
        if launched_world_size() > 1:
            end_at_exit(exit_code)
        raise


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
