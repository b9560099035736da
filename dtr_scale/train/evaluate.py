"""Sampling and measuring in the middle of training, with the averaged weights, on all ranks."""

import io
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from dtr_scale.data.reader import Samples
from dtr_scale.engines.base import Engine
from dtr_scale.engines.world import World
from dtr_scale.errors import DtrScaleError
from dtr_scale.evaluation.report import pixel_frechet_distance, read_all
from dtr_scale.evaluation.sampling import (
    SamplingSettings,
    draw_samples,
    grid_columns,
    save_grid,
)
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.journal import Record
from dtr_scale.train.ema import Ema

log = logging.getLogger(__name__)

_GRID_ROWS = 8


class PeriodicEvaluation:
    """Called with a step on every rank; rank 0 writes pictures and figures, if it has a folder.

    Pictures of small pixel data are compared with the held-out split; latents are kept as they
    are (`step_*.npz`), to be decoded and measured where a decoder is at hand.
    """

    def __init__(
        self,
        *,
        world: World,
        engine: Engine,
        ema: Ema,
        settings: SamplingSettings,
        num_samples: int,
        batch_size: int,
        conditions: Callable[[range], torch.Tensor] | None,
        held_out: Samples | None,
        folder: Path | None,
        report: Callable[[int, Record, Path], None],
        null_condition: torch.Tensor | None = None,
    ) -> None:
        self._world = world
        self._engine = engine
        self._ema = ema
        self._settings = settings
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._conditions = conditions
        self._null_condition = null_condition
        self._held_out = held_out
        self._folder = folder
        self._report = report

    def __call__(self, step: int) -> None:
        network = self._engine.network
        assert isinstance(network, Denoiser)
        # As many on every rank: sharded weights are gathered by all ranks together. What is too
        # much is drawn and dropped.
        share = -(-self._num_samples // self._world.world_size)
        first = self._world.rank * share
        with self._ema.swapped_in():
            part = draw_samples(
                network,
                self._settings,
                range(first, first + share),
                batch_size=self._batch_size,
                conditions=self._conditions,
                null_condition=self._null_condition,
                step=step - 1,  # the masks that were trained last, if they roam
            )
        images = torch.cat(self._world.all_gather_object(part))[: self._num_samples]
        if self._folder is not None:
            try:
                self._publish(step, images, network.num_classes, self._folder)
            except (DtrScaleError, OSError) as error:  # no figure is worth the run
                log.warning("step %d: evaluation failed: %s", step, error)

    def has_result(self, step: int) -> bool:
        """Tell every rank whether there are samples of a step: they are stored last and whole."""
        found = self._folder is not None and any(self._folder.glob(f"step_{step:08d}.*"))
        return self._world.broadcast_object(found)

    def _publish(self, step: int, images: torch.Tensor, num_classes: int, folder: Path) -> None:
        samples = io.BytesIO()
        if self._held_out is None:
            name = f"step_{step:08d}.npz"
            np.savez(samples, latents=images.numpy())
            open_folder(folder).write_bytes(name, samples.getbuffer())
            log.info("step %d: %d latents sampled to %s", step, len(images), folder / name)
            return
        reference, _ = read_all(self._held_out)
        distance = pixel_frechet_distance(images, reference)
        name, columns = f"step_{step:08d}.png", grid_columns(num_classes)
        save_grid(samples, images[: _GRID_ROWS * columns], columns=columns)
        open_folder(folder).write_bytes(name, samples.getbuffer())
        picture = folder / name
        log.info("step %d: frechet_distance %.3f, samples in %s", step, distance, picture)
        self._report(step, {"frechet_distance": distance}, picture)
