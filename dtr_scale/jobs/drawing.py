"""Draw samples of a run into stored batches: by any number of ranks, and on after a kill."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dtr_scale import __version__
from dtr_scale.engines.world import World
from dtr_scale.errors import UnfinishedError
from dtr_scale.evaluation.pictures import ROUNDING, to_uint8
from dtr_scale.evaluation.precision import one_thread, products_in, resolve_precision
from dtr_scale.evaluation.stored import StoredBatches
from dtr_scale.jobs.averages import share_of_begin
from dtr_scale.jobs.conditions import Conditions
from dtr_scale.jobs.measure import samples_manifest
from dtr_scale.jobs.ranks import Ranks
from dtr_scale.jobs.sampling import build_sampler, samples_compiled
from dtr_scale.jobs.trained import TrainedRun
from dtr_scale.logs import columns
from dtr_scale.prepare.encode import PictureEncoder, weights_sha256

log = logging.getLogger(__name__)

_LOG_SECONDS = 30.0
_MUCH_OF_BEGIN = 0.05


class Drawing(NamedTuple):
    """What is drawn of a run: pictures uint8 [n, H, W, C], or without a decoder x_start itself."""

    run: TrainedRun
    num_samples: int
    conditions: Conditions
    decoder: PictureEncoder | None
    guidance: tuple[float, ...] = ()
    """Scales of a sheet: each stored batch is the same samples, drawn with the next of them."""

    @property
    def told(self) -> str:
        """In words, with what is turned most often."""
        evaluation = self.run.experiment.evaluation
        scales = " and ".join(f"{scale:g}" for scale in self.guidance or [evaluation.cfg_scale])
        told = (
            f"{self.num_samples:,} samples of step {self.run.step:,}: {evaluation.sampler}, "
            f"{evaluation.num_sampling_steps} steps, guidance {scales}"
        )
        if self.guidance or self.num_samples >= evaluation.batch_size:
            return told
        return (
            f"{told}; in a whole batch of {evaluation.batch_size}, "
            f"--evaluation.batch_size={self.num_samples} is quicker"
        )

    def manifest(self, device: torch.device) -> dict[str, Any]:
        """Return all that the samples depend on."""
        run, evaluation = self.run, self.run.experiment.evaluation
        record = self.decoder.record if self.decoder else None
        rounding = {"rounding": ROUNDING} if self.decoder else {}
        sheet = {"guidance": list(self.guidance)} if self.guidance else {}
        return {
            **samples_manifest(
                run.experiment,
                num_samples=self.num_samples,
                precision=resolve_precision(evaluation.precision, device),
                averages=run.averages,
                checkpoints=run.checkpoints,
                step=run.step,
            ),
            "labels": self.conditions.told,
            "batch_size": evaluation.batch_size,
            "compiled": samples_compiled(run.experiment, device),
            "device": device_name(device),
            "weights_sha256": weights_sha256(run.network.state_dict()),
            "decoder": record.sha256 if record else None,
            "decoder_precision": record.precision if record else None,
            **rounding,
            **sheet,
            "dtr_scale": __version__,
        }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def draw_stored(drawing: Drawing, stored: StoredBatches, ranks: Ranks) -> None:
    """Draw what is missing of stored batches, whole batches on each rank; the ranks part then.

    Raises UnfinishedError where a rank is asked to leave: the batch that it draws is dropped, the
    finished ones stay.
    """
    world = ranks.world
    missing = world.broadcast_object(stored.missing() if world.is_main else None)
    if world.is_main and len(missing) < stored.num_batches:
        have = stored.num_batches - len(missing)
        log.info("going on: %d of %d batches are stored", have, stored.num_batches)
    if world.is_main and missing:
        log.info("drawing %s", drawing.told)
        _tell_of_noise(drawing.run)
    reason = _draw(drawing, stored, missing[world.rank :: world.world_size], ranks)
    if reason := ranks.part(reason):
        if world.is_main:
            have = stored.num_batches - len(stored.missing())
            told = "the same command goes on with them" if have else "nothing is kept"
            log.info(
                "leaving on request (%s): %d of %d batches are stored in %s; %s",
                reason, have, stored.num_batches, stored.path, told,
            )  # fmt: skip
        raise UnfinishedError(reason)


def _tell_of_noise(run: TrainedRun) -> None:
    """Say why samples of a short training may be noise: by its average, not by its weights."""
    share = max(share_of_begin(history, run.step) for history in run.averages)
    # What a run was started from is no noise.
    if share > _MUCH_OF_BEGIN and run.experiment.checkpoint.start_from is None:
        log.warning(
            "the average still holds %.0f%% of the weights that the training began with, so "
            "samples may be noise; --ema none draws by the weights of step %d themselves",
            100 * share, run.step,
        )  # fmt: skip


def checked(batches: Iterable[np.ndarray], ranks: Ranks) -> Iterator[np.ndarray]:
    """Yield batches; UnfinishedError between them where this rank is asked to leave."""
    for batch in batches:
        if reason := ranks.leave_reason():
            log.info("leaving on request (%s): all samples are drawn; give the command again to "
                     "write them", reason)  # fmt: skip
            raise UnfinishedError(reason)
        yield batch


def _draw(drawing: Drawing, stored: StoredBatches, batches: list[int], ranks: Ranks) -> str | None:
    """Draw this rank's batches; return why it left some of them undone, or None."""
    device, run = ranks.world.device, drawing.run
    precision = resolve_precision(run.experiment.evaluation.precision, device)
    sampler = build_sampler(
        run.experiment,
        run.network,
        device,
        conditions=drawing.conditions.of_samples,
        null_condition=drawing.conditions.null,
        step=run.mask_step,
    )
    progress = _Progress(len(batches), sampler.num_steps, stored, ranks.world)
    try:
        with products_in(precision, device), one_thread(device):
            for batch in batches:
                members = stored.members(batch)
                if drawing.guidance:
                    sampler = sampler.guided(drawing.guidance[batch])
                    members = stored.members(0)  # the same in each row
                x_start = sampler.draw(members, _leaving(ranks, progress))
                stored.write(batch, _stored_as(x_start, drawing.decoder))
    except UnfinishedError as error:
        return str(error)
    finally:
        progress.close()
    return None


def _stored_as(x_start: Tensor, decoder: PictureEncoder | None) -> np.ndarray:
    if decoder is None:
        return x_start.numpy()
    return to_uint8(decoder.decode(x_start)).permute(0, 2, 3, 1).contiguous().numpy()


def _leaving(ranks: Ranks, progress: "_Progress"):  # noqa: ANN202
    def steps(of_batch: Iterable[int]) -> Iterator[int]:
        # Not between batches alone: one may take longer than a scheduler's patience.
        for step in of_batch:
            if reason := ranks.leave_reason():
                raise UnfinishedError(reason)
            yield step
            progress.advance()

    return steps


class _Progress:
    """Shows on rank 0 how far all ranks are, who have equally much to do, and what is left."""

    def __init__(
        self, num_batches: int, num_steps: int, stored: StoredBatches, world: World
    ) -> None:
        self._total = num_batches * num_steps
        self._num_samples = stored.num_samples
        # The last batch is drawn whole, more than is wanted.
        whole = num_batches * stored.batch_size * world.world_size
        self._first = max(0, stored.num_samples - whole)
        self._done = 0
        self._start = self._logged = time.monotonic()
        self._shows = world.is_main and num_batches > 0
        self._bar: tqdm | None = None
        if self._shows and sys.stderr.isatty():
            layout = "sampling {percentage:3.0f}%|{bar}| {desc}"
            self._bar = tqdm(
                total=self._total,
                bar_format=layout,
                leave=False,
                ncols=columns(),
                nrows=24,  # as of `logs.ProgressBar`
                miniters=1,
            )

    def advance(self) -> None:
        self._done += 1
        if not self._shows:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_description_str(self._told(now), refresh=False)
            self._bar.update()
        elif now - self._logged > _LOG_SECONDS:
            self._logged = now
            log.info("sampling: %s", self._told(now))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _told(self, now: float) -> str:
        seconds = now - self._start
        drawn = (self._num_samples - self._first) * self._done / self._total
        left = timedelta(seconds=round(seconds / self._done * (self._total - self._done)))
        count = min(self._num_samples, self._first + int(drawn))
        return f"{count}/{self._num_samples} samples, {drawn / seconds:.3g} samples/s, eta {left}"
