"""Run the training loop, the same for every engine, data set, tracker and machine."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dtr_scale.checkpoint.manager import CheckpointManager
from dtr_scale.checkpoint.reader import CheckpointReader, LoadPlan
from dtr_scale.checkpoint.start import Start
from dtr_scale.data.batch import MicroBatch
from dtr_scale.data.loader import BatchLoader
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.diffusion.timesteps import TimestepSampler
from dtr_scale.engines.base import Engine
from dtr_scale.engines.place import Place
from dtr_scale.engines.vote import LeaveVote
from dtr_scale.engines.world import World
from dtr_scale.errors import DivergenceError
from dtr_scale.objectives.objective import Objective
from dtr_scale.signals import LeaveRequest
from dtr_scale.tracking.journal import Record
from dtr_scale.train.clock import OwnWork, RankTimes, Stopwatch
from dtr_scale.train.ema import Ema
from dtr_scale.train.figures import Readback, StepFigures, StepResult, StepSums
from dtr_scale.train.guard import UpdateGuard, Verdict
from dtr_scale.train.learning_rate import LearningRate
from dtr_scale.train.loss import Losses, StepLoss
from dtr_scale.train.skipped import SkippedStep
from dtr_scale.train.state import Probe, RunState, take_probe


class Trainer:
    """Trains from wherever the newest checkpoint stands to `max_steps`."""

    def __init__(
        self,
        *,
        world: World,
        engine: Engine,
        objective: Objective,
        diffusion: GaussianDiffusion,
        timesteps: TimestepSampler,
        loader: BatchLoader,
        ema: Ema,
        guard: UpdateGuard,
        checkpoints: CheckpointManager,
        meta: dict[str, Any],
        global_batch_size: int,
        max_steps: int,
        lr: LearningRate,
        log_every: int,
        save_every: int,
        evaluate_every: int = 0,
        compile_loss: bool = False,
    ) -> None:
        self.world = world
        self.engine = engine
        self.objective = objective
        self.diffusion = diffusion
        self.timesteps = timesteps
        self.loader = loader
        self.ema = ema
        self.guard = guard
        self.checkpoints = checkpoints
        self.meta = meta
        self.global_batch_size = global_batch_size
        self.max_steps = max_steps
        self.lr = lr
        self.log_every = log_every
        self.save_every = save_every
        self.evaluate_every = evaluate_every
        self.state = RunState(engine, ema, objective, guard)
        self.readback = Readback(world.device)
        self.is_compiled = compile_loss
        self._loss = StepLoss(diffusion, objective, compiled=compile_loss)
        self._vote = LeaveVote(world)
        self._watch = Stopwatch()
        self._own_work = OwnWork(world.device)
        self._rank_times = RankTimes()
        # What `resume` was given: a rollback takes no other checkpoints than a start would.
        self._accept: Callable[[CheckpointReader], LoadPlan] = LoadPlan
        self._save_is_owed = False
        self.place = Place()
        """Where the loop is, for who judges whether it hangs (`engines.peers`)."""
        # n_k of every shift of the clusters, copied once: in a step it would make the host wait.
        counts = torch.from_numpy(timesteps.counts_by_shift())
        self._counts, self._host_counts = counts.to(world.device), counts.tolist()

    @property
    def step(self) -> int:
        return self.state.step

    @property
    def saved_step(self) -> int | None:
        """Step of the newest complete checkpoint; a save in flight does not count yet."""
        return self.checkpoints.saved_step

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the state after this step is one to sample from."""
        return bool(self.step and self.evaluate_every) and self.step % self.evaluate_every == 0

    def run(
        self,
        leave: LeaveRequest,
        *,
        log: Callable[[Record], None],
        evaluate: Callable[[int], str | None] | None = None,
        on_step: Callable[[int, float], None] = lambda step, seconds: None,
        on_skip: Callable[[SkippedStep], None] = lambda step: None,
        on_rollback: Callable[[str], None] = lambda reason: None,
    ) -> str | None:
        """Train until `max_steps`, or until any rank asks to leave; return why it left, or None.

        The state is saved either way. `log` is given the journal's record of every logged step,
        `on_step` the number of every step and how long it took, `on_skip` the steps without an
        update, `on_rollback` why the run has gone back to a checkpoint. `evaluate` returns why it
        was cut off by a request to leave, on all ranks, or None.
        """
        # Setting memory aside takes 1.5 s for 2 GB, which the first save would stand still for.
        self.checkpoints.prepare(self.state.pieces())
        batches = self._batches()
        self._watch.restart()
        while self.step < self.max_steps:
            figures = self._train_step(batches)
            leaving = self._vote.passed(leave.reason is not None)
            # Before an evaluation too, which may take longer than all steps since a save.
            saving = leaving or self._save_is_due or self.evaluation_is_due
            # What is saved has been judged, and stands in the journal.
            results = self.readback.after(figures, up_to_now=saving)
            self.place.end_step(self.step)
            self.place.enter("log")  # to a disk that may be full or away for a while
            last = self._conclude(results, log, on_step, on_skip)
            self.place.enter("save")
            if last:
                told = f"updates skipped in a row up to step {last.step}: {self.guard.num_in_a_row}"
                batches = self._roll_back(last)
                on_rollback(told)
                self._watch.restart()
                if leaving:
                    return self._reason(leave)
                continue
            # All ranks leave at the same step, and so come to the same save.
            if leaving or self.step == self.max_steps:
                self._save_for_certain(results[-1])
            elif saving:
                self._save_or_owe(results[-1])
            if leaving and self.step < self.max_steps:
                return self._reason(leave)
            # Not at any last step: ten thousand samples may cost more than a short run.
            reason = None
            if evaluate and self.evaluation_is_due:
                # It swaps averages and weights in place.
                self.checkpoints.before_change()
                self.place.enter("evaluation")
                with self._watch.stopped():
                    reason = evaluate(self.step)
            if reason:
                self.checkpoints.wait()
                self._save_for_certain(results[-1])
                return reason
        return None

    def save(self, result: StepResult) -> None:
        """Copy the state and let it be written while training goes on."""
        probe = self.probe()
        meta = {**self.meta, **self.state.meta(), "probe": probe.as_dict() if probe else None}
        self.checkpoints.save(self.step, self.state.pieces(), meta, self._record(result))

    def _save_for_certain(self, result: StepResult) -> None:
        """Save and wait for it: no later one makes up for the last. UnsavedError if it cannot."""
        while self.saved_step != self.step:
            self.save(result)
            self.checkpoints.wait()

    def resume(self, accept: Callable[[CheckpointReader], LoadPlan] = LoadPlan) -> LoadPlan | None:
        """Go on from the newest complete checkpoint that `accept` has (see `load_newest`).

        Returns the plan that was followed; None if there is no checkpoint. Averages that are not
        taken from it begin at its weights.
        """
        self._accept = accept
        plan = self.checkpoints.load_newest(self.state.pieces(), accept)
        if plan is not None:
            self.state.load(plan.reader.meta, plan.fresh)
        return plan

    def start(self, read: Callable[[], Start]) -> None:
        """Begin with the state of another training; what it does not hold stays fresh."""
        # A file may not fit one rank's pieces. The others must not go on to `load`, a collective.
        with self.world.agree():
            start = read()
            start.copy_to(self.state.pieces())
        self.state.load({**self.state.meta(), "optimizer_step": start.optimizer_step})

    def probe(self) -> Probe | None:
        return take_probe(self.world, self.engine, self.diffusion, self.loader, self.state)

    def _train_step(self, batches: Iterator[MicroBatch]) -> StepFigures:
        """Update the weights once: all is queued on the device, and the host waits for nothing."""
        # The counts follow from the position: ANT-UW's exp(-s_k) / (2 K n_k) needs no collective.
        shift = self.timesteps.shift(self.state.samples_seen)
        num_ranks = self.world.world_size if self.world.world_size > 1 else 0
        sums = StepSums(self._counts[shift], self._host_counts[shift], num_ranks)
        for micro in range(self.loader.grad_accum_steps):
            # x_start and noise [n, C, H, W]; t, cluster and y [n], or y [n, L, D] of texts.
            self._own_work.begin()
            self.place.enter("data")
            batch = self._watch.next_of(batches).to(self.world.device)
            self.place.enter("forward")
            losses = self.engine.accumulate(
                self._losses,
                (*batch, sums.counts),
                # The engine must know before the forward whether this gradient is exchanged.
                last=micro == self.loader.grad_accum_steps - 1,
                end_forward=self._end_forward,
            )
            sums.add(Losses(*losses), batch.cluster)
        self._own_work.end_step()
        if num_ranks:
            sums.tell(self.world.rank, self._own_work.latest)
        # Before the update, whose all-gathers would stand in front of these few numbers.
        sums.reduce(self.world)
        # A save may still copy what the update changes; the device waits for it, the host does not.
        self.place.enter("save")
        self.checkpoints.before_change()
        self.place.enter("update")
        # By the step alone, so a resumed run has the same; its updates count from 1.
        self.engine.set_lr(self.lr.at(self.step + 1))
        limits = self.guard.limits(self.step + 1)
        verdict = Verdict(sums, self.global_batch_size, limits)
        # Averages are of the weights after the update, whose step counts from 1.
        grad_norm = self.engine.step(verdict, self.ema.averaging(self.step + 1))
        # After the last backward: all micro-batches were weighted by the same log-variances. Their
        # gradient is made of reduced losses, so each rank makes the same update of its replica.
        self.objective.update(sums.cluster_loss, sums.counts, verdict.skip)
        self.state.advance(self.global_batch_size)
        metrics = self.objective.metrics()
        return sums.to_host(self.step, self.state.samples_seen, grad_norm, verdict.skip, metrics)

    def _losses(self, *inputs: Tensor) -> Losses:
        """Return the losses of a micro-batch, given with the counts n_k of the global batch."""
        *tensors, counts = inputs
        batch = MicroBatch(*tensors)
        x_t = self.diffusion.q_sample(batch.x_start, batch.t, batch.noise)
        output = self.engine.forward(x_t, batch.t, batch.y, self.step)
        return self._loss(output, x_t, batch, counts)

    def _end_forward(self) -> None:
        self._own_work.end()
        self.place.enter("backward")

    def _conclude(
        self,
        results: list[StepResult],
        log: Callable[[Record], None],
        on_step: Callable[[int, float], None],
        on_skip: Callable[[SkippedStep], None],
    ) -> StepResult | None:
        """Count steps that the device has done, and log those that are due.

        Returns the step at which so many were skipped in a row that the run must go back. Sums and
        norm are global, so every rank comes to it at the same one.
        """
        for result in results:
            self.guard.note(result)
            if result.is_skipped:
                on_skip(self._skipped(result))
            self.state.means.add(result.mse, result.vb)
            self._own_work.conclude()
            self._rank_times.add(result.rank_seconds)
            on_step(result.step, self._watch.count(self.global_batch_size))
            # Not where the run is asked to leave: its journal must not tell how often it was.
            if self._due(self.log_every, result.step):
                log({**self._record(result), **self._watch.read(), **self._rank_times.read()})
                self.state.means.close()
            if self.guard.wants_rollback:
                return result
        return None

    def _record(self, result: StepResult) -> Record:
        """Return what the journal tells of a step but for the figures that tell the time."""
        own = result.record(self.lr.at(result.step))
        return {**own, **self.state.means.record(), **self.guard.counters()}

    def _skipped(self, result: StepResult) -> SkippedStep:
        return SkippedStep(
            step=result.step,
            salt=self.guard.rollbacks,
            loss=result.loss,
            mse=result.mse,
            grad_norm=result.grad_norm,
            limits=self.guard.limits(result.step),
            in_a_row=self.guard.num_in_a_row,
            samples=self.loader.sample_ids(result.samples_seen - self.global_batch_size),
        )

    def _divergence(self, result: StepResult) -> DivergenceError:
        in_a_row = self.guard.num_in_a_row
        return DivergenceError(
            f"step {result.step}: loss {result.loss}, gradient norm {result.grad_norm}: the "
            f"training has diverged; updates skipped in a row: {in_a_row}, rollbacks: "
            f"{self.guard.rollbacks}; {self.checkpoints.standing}. Start it again with a lower "
            "train.lr or train.grad_clip=1"
        )

    def _roll_back(self, last: StepResult) -> Iterator[MicroBatch]:
        """Go back to before the steps that were skipped, `last` the last, and re-draw from there.

        DivergenceError where that was in vain, or there is no checkpoint to go back to. The samples
        come in the same order, so that each comes once an epoch, with other timesteps, noise,
        mirrors and dropped labels.
        """
        # The save in flight may be the one to go back to.
        self.checkpoints.wait()
        broken, rollbacks = self._divergence(last), self.guard.rollbacks + 1

        def accept(reader: CheckpointReader) -> LoadPlan:
            if rollbacks > self.guard.max_rollbacks + self.guard.rollbacks_of(reader.meta):
                raise broken
            return self._accept(reader)

        plan = self.checkpoints.load_newest(
            self.state.pieces(), accept, up_to=self.guard.last_update
        )
        if plan is None:
            raise broken
        self.state.load(plan.reader.meta, plan.fresh)
        self.guard.rollbacks = rollbacks
        # A kill before the next save leads here again, by the same steps.
        self.checkpoints.forget_after(self.step)
        self.readback.clear()
        self._own_work = OwnWork(self.world.device)  # it waits for what was not read
        self._save_is_owed = False
        return self._batches()

    def _batches(self) -> Iterator[MicroBatch]:
        self.loader.seek(self.state.samples_seen, self.guard.rollbacks)
        return iter(self.loader)

    def _reason(self, leave: LeaveRequest) -> str:
        reasons = self.world.all_gather_object(leave.reason)
        return next(reason for reason in reasons if reason)

    @property
    def _save_is_due(self) -> bool:
        return self._save_is_owed or self._due(self.save_every)

    def _save_or_owe(self, result: StepResult) -> None:
        """Save, after a skipped step not before the next update.

        Otherwise checkpoints of skipped steps would push out those from before them.
        """
        self._save_is_owed = result.is_skipped and not self.evaluation_is_due
        if not self._save_is_owed:
            with self._watch.saving():
                self.save(result)

    def _due(self, every: int, step: int | None = None) -> bool:
        step = self.step if step is None else step
        return step % every == 0 or step == self.max_steps
