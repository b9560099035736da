"""Run the training loop, the same for every engine, data set, tracker and machine."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
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
from dtr_scale.engines.world import World
from dtr_scale.errors import DivergenceError
from dtr_scale.objectives.objective import Objective
from dtr_scale.signals import LeaveRequest
from dtr_scale.tracking.journal import Record
from dtr_scale.train.ema import Ema
from dtr_scale.train.progress import Stopwatch
from dtr_scale.train.state import Probe, RunState, take_probe


@dataclass(frozen=True)
class StepResult:
    """One step over the global batch: means of that step alone."""

    mse: float
    vb: float
    cluster_loss: dict[int, float]
    """Of the clusters that had samples."""
    objective: float
    grad_norm: float
    leave: bool


class StepSums:
    """Sums over the global batch of a step, fp64 on the device.

    They lie in one tensor, so that they cost one collective and one read:
    [wishes to leave, mse, vb, objective, loss of cluster 0, 1, ...].
    """

    def __init__(self, counts: np.ndarray, device: torch.device) -> None:
        # int [K], a function of the position. Kept on the host, too, so that `read` fetches less.
        self._host_counts = counts
        self.counts = torch.from_numpy(counts).to(device, non_blocking=True)
        # fp64: the order in which ranks and micro-batches are added must not show in the journal.
        self._sums = torch.zeros(4 + len(counts), dtype=torch.float64, device=device)

    @property
    def cluster_loss(self) -> Tensor:
        """Mean loss of each cluster, fp64 [K] on the device; nan where it has no samples."""
        return self._sums[4:] / self.counts

    def add(self, losses: dict[str, Tensor], share: Tensor, cluster: Tensor) -> None:
        """Add the losses [n] of a micro-batch, by cluster id, and its share of the objective."""
        mse, vb = losses["mse"].detach().double(), losses["vb"].detach().double()
        # On the device: an `.item()` here would make the host wait for every micro-batch.
        self._sums[1] += mse.sum()
        self._sums[2] += vb.sum()
        self._sums[3] += share.detach()
        self._sums[4:].index_add_(0, cluster, mse + vb)

    def reduce(self, world: World, leave: LeaveRequest) -> None:
        """Sum over all ranks."""
        # The wish to leave rides with the losses. All ranks learn of it at the same step, and so
        # save the same one, without a collective of its own.
        # `fill_` takes the number along with its kernel; an assignment would copy it from the
        # host, which then waits for all that is queued.
        self._sums[0].fill_(float(leave.reason is not None))
        world.all_reduce_sum(self._sums)

    def read(self, grad_norm: Tensor) -> StepResult:
        """Return the means on the host. It waits here for the device, once per step."""
        leave, mse, vb, objective, *losses, norm = torch.cat(
            [self._sums, grad_norm.detach().double().view(1)]
        ).tolist()
        counts = self._host_counts.tolist()
        return StepResult(
            mse=mse / sum(counts),
            vb=vb / sum(counts),
            cluster_loss={k: losses[k] / count for k, count in enumerate(counts) if count},
            objective=objective,
            grad_norm=norm,
            leave=leave > 0,
        )


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
        checkpoints: CheckpointManager,
        meta: dict[str, Any],
        global_batch_size: int,
        max_steps: int,
        lr: float,
        log_every: int,
        save_every: int,
        evaluate_every: int = 0,
    ) -> None:
        self.world = world
        self.engine = engine
        self.objective = objective
        self.diffusion = diffusion
        self.timesteps = timesteps
        self.loader = loader
        self.ema = ema
        self.checkpoints = checkpoints
        self.meta = meta
        self.global_batch_size = global_batch_size
        self.max_steps = max_steps
        self.lr = lr
        self.log_every = log_every
        self.save_every = save_every
        self.evaluate_every = evaluate_every
        self.state = RunState(engine, ema, objective)
        self._watch = Stopwatch()

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
    ) -> str | None:
        """Train until `max_steps`, or until any rank asks to leave; return why it left, or None.

        The state is saved either way. `log` is given the journal's record of every logged step.
        `evaluate` returns why it was cut off by a request to leave, on all ranks, or None.
        """
        # Setting memory aside takes 1.5 s for 2 GB, which the first save would stand still for.
        self.checkpoints.prepare(self.state.pieces())
        self.loader.seek(self.state.samples_seen)
        batches = iter(self.loader)
        self._watch.restart()
        while self.step < self.max_steps:
            result = self._train_step(batches, leave)
            self.state.advance(self.global_batch_size)
            # Not where the run is asked to leave: its journal must not tell how often it was.
            if self._due(self.log_every):
                log({**self._figures(result), **self._watch.read()})
            # `leave` is a sum over ranks, so all of them come to the same save.
            if result.leave or self.step == self.max_steps:
                self._save_for_certain(result)
            elif self._due(self.save_every) or self.evaluation_is_due:
                # Before an evaluation too, which may take longer than all steps since a save.
                self.save(result)
            if result.leave and self.step < self.max_steps:
                reasons = self.world.all_gather_object(leave.reason)
                return next(reason for reason in reasons if reason)
            # Not at any last step: ten thousand samples may cost more than a short run.
            reason = None
            if evaluate and self.evaluation_is_due:
                with self._watch.stopped():
                    reason = evaluate(self.step)
            if reason:
                self.checkpoints.wait()
                self._save_for_certain(result)
                return reason
        return None

    def save(self, result: StepResult) -> None:
        """Copy the state and let it be written while training goes on."""
        probe = self.probe()
        meta = {**self.meta, **self.state.meta(), "probe": probe.as_dict() if probe else None}
        self.checkpoints.save(self.step, self.state.pieces(), meta, self._figures(result))

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

    def _train_step(self, batches: Iterator[MicroBatch], leave: LeaveRequest) -> StepResult:
        """Update the weights once; everything is queued on the device before the host reads it."""
        # The counts follow from the position: ANT-UW's exp(-s_k) / (2 K n_k) needs no collective.
        sums = StepSums(self.timesteps.counts(self.state.samples_seen), self.world.device)
        for micro in range(self.loader.grad_accum_steps):
            # x_start and noise [n, C, H, W]; t, cluster and y [n], or y [n, L, D] of texts.
            batch = self._watch.next_of(batches).to(self.world.device)
            model_fn = partial(self.engine.forward, y=batch.y, step=self.step)
            # The engine must know before the forward whether this gradient is exchanged.
            with self.engine.micro_step(last=micro == self.loader.grad_accum_steps - 1):
                losses = self.diffusion.training_losses(
                    model_fn, batch.x_start, batch.t, batch.noise
                )
                snr = self.diffusion.snr(batch.t)
                share = self.objective.loss(
                    **losses, snr=snr, cluster=batch.cluster, counts=sums.counts
                )
                self.engine.backward(share)
            sums.add(losses, share, batch.cluster)
        # Before the update, whose all-gathers would stand in front of these few numbers: so they
        # have arrived when the host asks for them.
        sums.reduce(self.world, leave)
        grad_norm = self.engine.step()
        # After the last backward: all micro-batches were weighted by the same log-variances. Their
        # gradient is made of reduced losses, so each rank makes the same update of its replica.
        self.objective.update(sums.cluster_loss, sums.counts)
        # Of the weights after the update, whose step counts from 1.
        self.ema.update(self.step + 1)
        self._watch.count(self.global_batch_size)
        result = sums.read(grad_norm)
        # After the update, for the sake of one wait a step. The weights in memory are spoilt, but
        # nothing has saved them. Sums and norm are global: every rank raises.
        self._refuse_divergence(result)
        return result

    def _refuse_divergence(self, result: StepResult) -> None:
        """Stop before broken weights reach a checkpoint."""
        if not math.isfinite(result.mse + result.vb + result.grad_norm):
            self.checkpoints.close()  # the save in flight may be the one to go on from
            raise DivergenceError(
                f"step {self.step + 1}: loss {result.mse + result.vb}, gradient norm "
                f"{result.grad_norm}: the training has diverged; {self.checkpoints.standing}. "
                "Start it again with a lower train.lr or train.grad_clip=1"
            )

    def _figures(self, result: StepResult) -> Record:
        """Return the journal's record of a step, but for the figures that tell the time."""
        return {
            "step": self.step,
            "samples_seen": self.state.samples_seen,
            # Unweighted, to compare runs of different objectives.
            "loss": result.mse + result.vb,
            "objective": result.objective,
            "mse": result.mse,
            "vb": result.vb,
            **{f"loss_cluster_{k}": loss for k, loss in result.cluster_loss.items()},
            **self.objective.metrics(),
            "lr": self.lr,
            "grad_norm": result.grad_norm,
        }

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.max_steps
