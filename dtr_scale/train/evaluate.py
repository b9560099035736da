"""Sample and measure in the middle of training, with the averaged weights, on all ranks."""

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dtr_scale.data.reader import Samples
from dtr_scale.engines.base import Engine
from dtr_scale.engines.world import World
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


class _CutOffError(Exception):
    """Some rank asks to leave; raised on all ranks at the same sampling step."""


class _FailedError(Exception):
    """Some rank has failed, as the message tells; raised on all ranks at the same step."""


class _Drawn(NamedTuple):
    images: torch.Tensor
    """All samples [num_samples, C, H, W]; fewer where the drawing was cut off."""
    num_batches: int
    """Batches drawn on each rank by this job; others may have been kept by an earlier one."""
    cut_off: str | None
    """The reason, if the drawing was cut off."""


class PeriodicEvaluation:
    """Called with a step on every rank; rank 0 writes pictures and figures, if it has a folder.

    Pictures of small pixel data are compared with the held-out split; latents are kept as they
    are (`step_*.npz`), to be decoded and measured where a decoder is at hand. An evaluation that
    fails is told and never ends the run; only a rank that fails alone inside a network whose
    weights are sharded does, since the others wait for it in a collective.

    One that is cut off by a request to leave keeps the samples it has drawn, and the next start
    goes on with them (`make_up`).
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
        null_condition: torch.Tensor | None = None,
        leave_reason: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.on_result: Callable[[int, Record, Path], None] = lambda step, figures, picture: None
        """Called on rank 0 with a step, its figures and the picture of its samples."""
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
        self._leave_reason = leave_reason

    def check(self) -> None:
        """Raise now, on the way to the first step, what is wrong with the settings."""
        self._draw_batch(range(0), step=1)

    def __call__(self, step: int) -> str | None:
        """Evaluate a step; return why that was cut off, None where it was not."""
        return self._evaluate(step).cut_off

    def make_up(self, step: int) -> str | None:
        """Evaluate a step that an earlier job could not; return why that was cut off, or None.

        None too if there was no time for one more batch. Then training goes first and this
        evaluation is given up: with a time limit that is too short for it, each start would do
        nothing else, and the run would never advance.
        """
        drawn = self._evaluate(step)
        if drawn.cut_off and not drawn.num_batches:
            self._forget(step)
            if self._folder:
                log.warning("step %d: no time for its evaluation, which is given up", step)
            return None
        return drawn.cut_off

    def _evaluate(self, step: int) -> _Drawn:
        try:
            drawn = self._draw(step)
        except _FailedError as error:
            if self._world.is_main:
                log.warning("step %d: evaluation failed, training goes on: %s", step, error)
            return _Drawn(torch.empty(0), 0, None)
        if self._folder is not None and not drawn.cut_off:
            try:
                self._publish(step, drawn.images, self._network.num_classes, self._folder)
            except Exception as error:  # no figure is worth the run
                log.warning(
                    "step %d: evaluation failed, training goes on: %s", step, _message(error)
                )
            self._forget(step)
        return drawn

    def _draw(self, step: int) -> _Drawn:
        """Draw what is missing of a step's samples; _FailedError if that fails.

        As many on every rank: sharded weights are gathered by all ranks together. What is too
        much is drawn and dropped.
        """
        world = self._world
        share = -(-self._num_samples // world.world_size)
        # Batches have fixed members: the rounding of a matrix product depends on its rows.
        batches = [
            range(i, min(i + self._batch_size, share)) for i in range(0, share, self._batch_size)
        ]
        kept = self._kept(step)
        # Rank 0 alone reads what was kept. All must skip the same batches: they meet at every
        # sampling step.
        before = world.broadcast_object(0 if kept is None else kept.shape[1])
        drawn: list[torch.Tensor] = [torch.empty(0, *self._shape)]
        cut_off, first = False, world.rank * share
        # On every rank, in and out: bringing sharded weights up to date is a collective.
        with self._ema.swapped_in():
            try:
                self._draw_together(
                    (range(first + b.start, first + b.stop) for b in batches if b.stop > before),
                    step,
                    drawn,
                )
            except _CutOffError:
                cut_off = True
        parts = torch.stack(world.all_gather_object(torch.cat(drawn)))  # [W, drawn, C, H, W]
        parts = parts if kept is None else torch.cat([kept, parts], dim=1)
        reason = None
        if cut_off:
            reason = next(filter(None, world.all_gather_object(self._leave_reason())))
            if len(drawn) > 1:  # else what is kept of it, if anything, is stored already
                self._keep(step, parts)
        return _Drawn(parts.flatten(0, 1)[: self._num_samples], len(drawn) - 1, reason)

    def _draw_together(
        self, batches: Iterable[range], step: int, drawn: list[torch.Tensor]
    ) -> None:
        """Draw batches in step with the other ranks; raise what one of them raises on all."""
        failure: str | None = None
        try:
            for batch in batches:
                drawn.append(self._draw_batch(batch, step))
        except (_CutOffError, _FailedError):
            raise
        except Exception as error:
            # The others meet it at their next sampling step, or here after their last.
            failure = _message(error)
        # Without a failure, too: it answers a rank that failed in its last step.
        self._agree(failure)

    def _draw_batch(self, batch: range, step: int) -> torch.Tensor:
        return draw_samples(
            self._network,
            self._settings,
            batch,
            batch_size=self._batch_size,
            conditions=self._conditions,
            null_condition=self._null_condition,
            step=step - 1,  # the masks that were trained last, if they roam
            progress=self._in_step,
        )

    def _in_step(self, steps: Iterable[int]) -> Iterator[int]:
        # Not between batches alone: one may take longer than a scheduler's patience.
        for step in steps:
            self._agree()
            yield step

    def _agree(self, failure: str | None = None) -> None:
        """Raise on all ranks if one has failed or asks to leave: all draw the same steps."""
        wishes = torch.tensor([failure is not None, self._leave_reason() is not None])
        # The host waits here at every sampling step; only so can all ranks stop at the same one.
        failed, leaving = self._world.all_reduce_sum(wishes.float().to(self._world.device)).tolist()
        if failed:
            failures = self._world.all_gather_object(failure)
            raise _FailedError(next(filter(None, failures)))
        if leaving:
            raise _CutOffError

    @property
    def _network(self) -> Denoiser:
        network = self._engine.network
        assert isinstance(network, Denoiser)
        return network

    @property
    def _shape(self) -> tuple[int, int, int]:
        network = self._network
        return network.in_channels, network.input_size, network.input_size

    def _kept(self, step: int) -> torch.Tensor | None:
        """Return what an earlier job has drawn of a step [W, n, C, H, W]; None on other ranks."""
        if self._folder is None:
            return None
        try:
            with np.load(self._folder / _kept_name(step)) as kept:
                return torch.from_numpy(kept["parts"]) if kept["plan"] == self._plan else None
        except Exception:  # whatever it is, drawing again is better; the other ranks wait
            return None

    def _keep(self, step: int, parts: torch.Tensor) -> None:
        if self._folder is None:
            return
        file = io.BytesIO()
        np.savez(file, parts=parts.numpy(), plan=np.array(self._plan))
        try:
            open_folder(self._folder).write_bytes(_kept_name(step), file.getbuffer())
        except OSError as error:
            log.warning("step %d: the samples drawn so far are not kept: %s", step, error)
            return
        count = parts.shape[0] * parts.shape[1]
        log.info("step %d: evaluation cut off; %d samples are kept for the next start", step, count)

    def _forget(self, step: int) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / _kept_name(step)).unlink(missing_ok=True)

    @property
    def _plan(self) -> str:
        """The settings and the ranks' shares under which samples were kept; others do not fit."""
        places = [self._world.world_size, self._num_samples, self._batch_size]
        return json.dumps([*places, self._settings.manifest()])

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
        log.info("step %d: pixel_frechet_distance %.3f, samples in %s", step, distance, picture)
        # After the picture is written: MLflow's thread reads the file.
        self.on_result(step, {"pixel_frechet_distance": distance}, picture)


def _kept_name(step: int) -> str:
    return f".step_{step:08d}.kept.npz"


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
