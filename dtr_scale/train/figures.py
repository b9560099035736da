"""Sum a step's losses on the device, and bring them to the host when it need not wait for them."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dtr_scale.engines.world import World
from dtr_scale.tracking.journal import Record
from dtr_scale.train.loss import Losses


@dataclass(frozen=True)
class StepResult:
    """One step over the global batch: means of that step alone, and what it left behind."""

    step: int
    samples_seen: int
    mse: float
    vb: float
    cluster_loss: dict[int, float]
    """Of the clusters that had samples."""
    objective: float
    grad_norm: float
    is_skipped: bool
    """Whether no update was made, see `UpdateGuard`."""
    metrics: Record
    """The objective's own parameters after the step."""
    rank_seconds: Sequence[float] = ()
    """What each rank's own work took, as `OwnWork` tells it; nothing in a world of one."""

    @property
    def loss(self) -> float:
        """Unweighted, to compare runs of different objectives."""
        return self.mse + self.vb

    def record(self, lr: float) -> Record:
        """Return the journal's record of the step, but for the figures that tell the time."""
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "loss": self.loss,
            "objective": self.objective,
            "mse": self.mse,
            "vb": self.vb,
            **{f"loss_cluster_{k}": loss for k, loss in self.cluster_loss.items()},
            **self.metrics,
            "lr": lr,
            "grad_norm": self.grad_norm,
        }


class StepSums:
    """Sums over the global batch of a step, fp64 on the device.

    They lie in one tensor, so that they cost one collective: [mse, vb, objective, loss of cluster
    0, 1, ..., seconds of rank 0, 1, ...]. `counts` int [K] are the samples of each cluster in the
    global batch, on the device, and `host_counts` the same.
    """

    def __init__(self, counts: Tensor, host_counts: Sequence[int], num_ranks: int = 0) -> None:
        self.counts = counts
        self._host_counts = host_counts
        self._num_ranks = num_ranks
        # fp64: the order in which ranks and micro-batches are added must not show in the journal.
        size = 3 + len(counts) + num_ranks
        self._sums = torch.zeros(size, dtype=torch.float64, device=counts.device)

    @property
    def cluster_loss(self) -> Tensor:
        """Mean loss of each cluster, fp64 [K] on the device; nan where it has no samples."""
        return self._sums[3 : 3 + len(self.counts)] / self.counts

    @property
    def mse(self) -> Tensor:
        """Sum over the samples, fp64 [] on the device."""
        return self._sums[0]

    @property
    def loss(self) -> Tensor:
        """Sum of mse + vb over the samples, fp64 [] on the device."""
        return self._sums[:2].sum()

    def add(self, losses: Losses, cluster: Tensor) -> None:
        """Add the losses of a micro-batch, by cluster id [n], and its share of the objective."""
        mse, vb = losses.mse.detach().double(), losses.vb.detach().double()
        # On the device: an `.item()` here would make the host wait for every micro-batch.
        self._sums[0] += mse.sum()
        self._sums[1] += vb.sum()
        self._sums[2] += losses.share.detach()
        self._sums[3 : 3 + len(self.counts)].index_add_(0, cluster, mse + vb)

    def tell(self, rank: int, seconds: float) -> None:
        """Tell the other ranks how long this one's own work takes."""
        # A number goes with the kernel that writes it. An assignment would make a tensor of it, and
        # the host wait for its copy.
        self._sums[3 + len(self.counts) + rank].fill_(seconds)

    def reduce(self, world: World) -> None:
        """Sum over all ranks."""
        world.all_reduce_sum(self._sums)

    def to_host(
        self,
        step: int,
        samples_seen: int,
        grad_norm: Tensor,
        skip: Tensor,
        metrics: Mapping[str, Tensor],
    ) -> "StepFigures":
        """Send the sums, the norm [], `skip` [] and vectors of the objective's to the host."""
        parts = [self._sums, grad_norm.detach().view(1), skip.view(1), *metrics.values()]
        # A copy, of what the next step changes in place.
        values = torch.cat([part.double() for part in parts])
        names = [f"{name}_{k}" for name, vector in metrics.items() for k in range(len(vector))]
        return StepFigures(
            step, samples_seen, self._host_counts, names, values, num_ranks=self._num_ranks
        )


class StepFigures:
    """A step's figures on their way to the host."""

    def __init__(
        self,
        step: int,
        samples_seen: int,
        counts: Sequence[int],
        names: list[str],
        values: Tensor,
        *,
        num_ranks: int,
    ) -> None:
        self._step = step
        self._samples_seen = samples_seen
        self._counts = counts
        self._names = names
        self._num_ranks = num_ranks
        # From a GPU, into page-locked memory: without that the host would wait here.
        self._values = values.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.current_stream().record_event() if values.is_cuda else None

    def read(self) -> StepResult:
        """Return the means. The host waits until the device has done this step, if it has not."""
        if self._arrived:
            self._arrived.synchronize()
        mse, vb, objective, *rest = self._values.tolist()
        counts = self._counts
        # The sums of the clusters, the ranks' seconds, the norm, the objective's parameters.
        losses, rest = rest[: len(counts)], rest[len(counts) :]
        seconds, rest = rest[: self._num_ranks], rest[self._num_ranks :]
        norm, skip, *metrics = rest
        return StepResult(
            step=self._step,
            samples_seen=self._samples_seen,
            mse=mse / sum(counts),
            vb=vb / sum(counts),
            cluster_loss={k: losses[k] / count for k, count in enumerate(counts) if count},
            objective=objective,
            grad_norm=norm,
            is_skipped=bool(skip),
            metrics=dict(zip(self._names, metrics, strict=True)),
            rank_seconds=seconds,
        )


class Readback:
    """Hands out the results of steps in their order, on a GPU a step late.

    While the device computes a step the host queues the next one, and then reads the figures of the
    first: it is never more than a step ahead, and the device never waits for it. On a CPU a step is
    done when it has been queued.
    """

    def __init__(self, device: torch.device) -> None:
        # The same on every rank: all of them find out at one step that the training has diverged.
        self.steps_late = 1 if device.type == "cuda" else 0
        self._waiting: deque[StepFigures] = deque()

    def clear(self) -> None:
        """Forget the steps that were not read: the run goes back to before them."""
        self._waiting.clear()

    def after(self, figures: StepFigures, *, up_to_now: bool) -> list[StepResult]:
        """Take a step's figures; return the results that are due, or all `up_to_now`."""
        self._waiting.append(figures)
        num_due = len(self._waiting) - (0 if up_to_now else self.steps_late)
        return [self._waiting.popleft().read() for _ in range(num_due)]
