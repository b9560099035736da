"""The next samples and their loss: what tells whether a restored run is where it was."""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from dtr_scale.data.batch import MicroBatch
from dtr_scale.data.loader import BatchLoader
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.engines.base import Engine
from dtr_scale.engines.world import World
from dtr_scale.errors import CheckpointError, DataError

NUM_SAMPLES = 4
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Relative; another engine or world size adds in another order."""


@dataclass(frozen=True)
class Probe:
    """The first samples of the next step, as (shard, index), and their mean of mse + vb."""

    sample_ids: list[list[int]]
    loss: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def take_probe(
    world: World, engine: Engine, diffusion: GaussianDiffusion, loader: BatchLoader, position: int
) -> Probe | None:
    """Return the probe at `position` samples seen; None if its samples cannot be read now.

    Every rank calls it: engines that shard the weights gather them for it.
    """
    found: tuple[list[list[int]], MicroBatch] | None = None
    if world.is_main:
        try:
            found = loader.peek(position, NUM_SAMPLES)
        except DataError:
            found = None
    found = world.broadcast_object(found)
    if found is None:
        return None
    sample_ids, batch = found
    batch = batch.to(world.device)
    model_fn = partial(engine.network, y=batch.y, step=position // loader.global_batch_size)
    # Compiled blocks would be compiled again for so few samples.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        losses = diffusion.training_losses(model_fn, batch.x_start, batch.t, batch.noise)
    return Probe(sample_ids, (losses["mse"] + losses["vb"]).double().mean().item())


def compare(stored: dict[str, Any], found: Probe, precisions: set[str], url: str) -> str:
    """Return in words how well the probe agrees with the stored one; CheckpointError otherwise.

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
