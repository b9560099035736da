"""Hold a run's state and position, and check both after a load by the loss of a few samples."""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtr_scale.data.batch import MicroBatch
from dtr_scale.data.loader import BatchLoader
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.engines.base import Engine, Piece
from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError, DataError
from dtr_scale.objectives.objective import Objective
from dtr_scale.train.ema import Ema
from dtr_scale.train.guard import UpdateGuard
from dtr_scale.train.means import LossMeans

# Few: every save waits for their forward. They need not be many to tell other weights apart.
NUM_PROBED = 4
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative; another engine or world size adds in another order."""


class RunState:
    """Everything that a checkpoint holds of a run: this rank's tensors, and the position.

    The position is `samples_seen`: which samples come next and every draw for them are functions
    of it. `step` counts the updates, with those that were skipped.
    """

    def __init__(self, engine: Engine, ema: Ema, objective: Objective, guard: UpdateGuard) -> None:
        self.step = 0
        self.samples_seen = 0
        self.means = LossMeans()
        self._engine = engine
        self._ema = ema
        self._objective = objective
        self._guard = guard
        self._objective_state: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    def advance(self, num_samples: int) -> None:
        """Count an update made from so many samples."""
        self.step += 1
        self.samples_seen += num_samples

    def pieces(self) -> dict[str, Piece]:
        """Return the tensors to save, or to write to before `load`.

        Those of the engine and the averages are views of the live ones. The objective's and the
        buffers are small, and copies, which `load` hands back.
        """
        self._objective_state = self._objective.state_dict()
        buffers = persistent_buffers(self._engine.network)
        self._buffers = {name: buffer.float() for name, buffer in buffers.items()}
        return {
            **self._ema.pieces(),
            **self._engine.pieces(),
            **_whole("objective", self._objective_state),
            **_whole("buffer", self._buffers),
        }

    def meta(self) -> dict[str, Any]:
        """Return the position, and how averages and means were made, for a checkpoint's meta."""
        return {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "optimizer_step": self._engine.optimizer_step,
            "averages": self._ema.meta(),
            "means": self.means.meta(),
            "updates": self._guard.meta(),
        }

    def load(self, meta: Mapping[str, Any], fresh: Collection[str] = ()) -> None:
        """Go on from `pieces` that were written to, at the position of `meta`.

        Averages whose kinds are `fresh` were not written and begin at the weights. Every rank
        calls it: engines that shard the weights talk to each other here.
        """
        # Engines compute with casts or gathered copies of what was written to.
        self._engine.push_masters()
        self._objective.load_state_dict(self._objective_state)
        for name, buffer in persistent_buffers(self._engine.network).items():
            buffer.copy_(self._buffers[name])
        # Not `step`, which is 0 where a training starts from the weights and moments of another.
        self._engine.optimizer_step = meta["optimizer_step"]
        self.step, self.samples_seen = meta["step"], meta["samples_seen"]
        # Older checkpoints have no histories of averages, no means and no skipped updates.
        self._guard.load(meta.get("updates", {}))
        self._ema.load(meta.get("averages", {}), self.step, fresh)
        self.means.load(meta.get("means", {}))


def _whole(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    return {
        f"{kind}/{name}": Piece(tuple(tensor.shape), 0, tensor.view(-1))
        for name, tensor in tensors.items()
    }


def persistent_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's own tensors that are neither learned nor made from its settings.

    Such as the masks of an R-TR checkpoint. Flags and small numbers: fp32 holds them exactly.
    """
    # With duplicates: `state_dict` has a tied parameter under each of its names.
    learned = dict(network.named_parameters(remove_duplicate=False))
    state = network.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name not in learned}


@dataclass(frozen=True)
class Probe:
    """The first samples of the next step, as (shard, index), and their mean of mse + vb."""

    sample_ids: list[list[int]]
    loss: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def take_probe(
    world: World,
    engine: Engine,
    diffusion: GaussianDiffusion,
    loader: BatchLoader,
    state: RunState,
) -> Probe | None:
    """Return the probe of a run as it stands; None if its samples cannot be read now.

    Every rank calls it: engines that shard the weights gather them for it.
    """
    found: tuple[list[list[int]], MicroBatch] | None = None
    if world.is_main:
        try:
            # The same samples on every rank, so that the probe is of no world size.
            found = loader.peek(state.samples_seen, NUM_PROBED)
        except DataError:
            found = None
    found = world.broadcast_object(found)
    if found is None:
        return None
    sample_ids, batch = found
    batch = batch.to(world.device)
    model_fn = partial(engine.network, y=batch.y, step=state.step)
    # Compiled blocks would be compiled again for so few samples.
    # The host waits for this loss, once per save.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        losses = diffusion.training_losses(model_fn, batch.x_start, batch.t, batch.noise)
    return Probe(sample_ids, (losses["mse"] + losses["vb"]).double().mean().item())


def compare_probes(stored: dict[str, Any], found: Probe, precisions: set[str], url: str) -> str:
    """Return in words how well a probe agrees with the stored one; CheckpointError otherwise.

    `precisions` are those of the two jobs.
    """
    if stored["sample_ids"] != found.sample_ids:
        raise CheckpointError(
            f"{url}: the next samples were {stored['sample_ids']} and are {found.sample_ids}; the "
            "data or their order have changed"
        )
    tolerance = max(TOLERANCE[precision] for precision in precisions)
    if not math.isclose(found.loss, stored["loss"], rel_tol=tolerance, abs_tol=tolerance):
        raise CheckpointError(
            f"{url}: the loss of its next {len(found.sample_ids)} samples was {stored['loss']:.8g} "
            f"and is {found.loss:.8g}; the weights that were restored are not those saved"
        )
    difference = abs(found.loss - stored["loss"]) / max(abs(stored["loss"]), 1e-12)
    return f"next samples as stored, probe loss {found.loss:.6g} (differs by {difference:.1e})"
