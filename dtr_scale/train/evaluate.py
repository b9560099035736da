"""Sample and measure in the middle of training, with the averaged weights, on all ranks."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtr_scale.diffusion.samplers import Progress
from dtr_scale.engines.base import Engine
from dtr_scale.evaluation.batchwise import BatchMeasure
from dtr_scale.evaluation.features import Extractor
from dtr_scale.evaluation.precision import one_thread, products_in
from dtr_scale.evaluation.reference import FeatureSums, Reference
from dtr_scale.evaluation.report import is_newest_report, write_report
from dtr_scale.evaluation.sampling import SamplingSettings, draw_samples
from dtr_scale.logs import ProgressBar
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.journal import Record
from dtr_scale.train.ema import Ema
from dtr_scale.train.held_out import LOSS, HeldOutLoss
from dtr_scale.train.kept_batches import KeptBatches, remove_others
from dtr_scale.train.rounds import CutOffError, FailedError, Rounds, message

log = logging.getLogger(__name__)

# Of the checkpoint, or of the machine, which moves last digits: a run may go on on another one.
_NO_SETTINGS = {"step", "checkpoints", "ema", "batch_size", "compiled", "device", "dtr_scale"}


class Result(NamedTuple):
    """What an evaluation has found, on rank 0."""

    step: int
    figures: Record
    metric: str | None
    """Which of the figures checkpoints are compared by; less is better."""
    manifest: dict[str, Any]
    picture: Path | None

    @property
    def settings(self) -> str:
        """Name all that the figures depend on but the checkpoint, as a hash."""
        told = {key: value for key, value in self.manifest.items() if key not in _NO_SETTINGS}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class _Outcome(NamedTuple):
    cut_off: str | None
    """The reason, if it was cut off."""
    num_batches: int
    """Batches drawn by this job, on rank 0; others may have been kept by an earlier one."""


class PeriodicEvaluation:
    """Called with a step on every rank; rank 0 writes pictures and numbers, if it has a run.

    Batch k holds samples kB to (k+1)B - 1 whatever the number of ranks, and whole batches are dealt
    to ranks, which decode them and compute their features. What rank 0 gathers is kept in the
    folder of samples until the evaluation is complete: the next start goes on with it (`make_up`).

    An evaluation that fails is told and never ends the run; only a rank that fails alone inside a
    network whose weights are sharded does, since the others wait for it in a collective.
    """

    def __init__(
        self,
        *,
        rounds: Rounds,
        engine: Engine,
        ema: Ema,
        settings: SamplingSettings,
        num_samples: int,
        batch_size: int,
        conditions: Callable[[range], torch.Tensor] | None,
        null_condition: torch.Tensor | None,
        measure: BatchMeasure,
        held_out_loss: HeldOutLoss | None,
        manifest: Callable[[int], dict[str, Any]],
        run_dir: Path | None,
        samples_dir: Path | None,
    ) -> None:
        self.on_result: Callable[[Result], None] = lambda result: None
        """Called on rank 0 with what an evaluation has found, when that is on disk."""
        self._rounds = rounds
        self._progress: Progress = rounds.steps
        self._engine = engine
        self._ema = ema
        self._settings = settings
        self._num_samples = num_samples
        self._batch_size = batch_size
        self._conditions = conditions
        self._null_condition = null_condition
        self._measure = measure
        self._held_out_loss = held_out_loss
        self._manifest = manifest
        self._run_dir = run_dir
        self._samples_dir = samples_dir

    def check(self) -> None:
        """Raise now, on the way to the first step, what is wrong with the settings."""
        # Of no samples: sampler and guidance are built, which is where bad settings are found.
        self._draw_batch(range(0), 1)

    def __call__(self, step: int) -> str | None:
        """Evaluate a step; return why that was cut off, None where it was not."""
        kept = self._kept(step)
        if kept:
            kept.remove()  # of a branch that was left when a run went back
        return self._evaluate(step, kept).cut_off

    def is_due_again(self, step: int) -> bool:
        """Tell every rank whether an earlier job saved a step and did not evaluate it."""
        missing = False
        if self._samples_dir is not None and (kept := self._kept(step)):
            remove_others(self._samples_dir, step)
            # What is kept of a step is removed when all else is written.
            missing = kept.exist or not any(self._samples_dir.glob(f"step_{step:08d}.*"))
        return self._rounds.world.broadcast_object(missing)

    def make_up(self, step: int) -> str | None:
        """Evaluate a step that an earlier job could not; return why that was cut off, or None.

        None too if there was no time for one more batch. Then training goes first and this
        evaluation is given up: with a time limit that is too short for it, each start would do
        nothing else, and the run would never advance.
        """
        kept = self._kept(step)
        if kept:
            kept.load()
        outcome = self._evaluate(step, kept)
        given_up = self._rounds.world.broadcast_object(
            bool(outcome.cut_off) and not outcome.num_batches
        )
        if not given_up:
            return outcome.cut_off
        if kept:
            # Last of all: a kill before it leaves the batches to the next start.
            kept.remove()
            log.warning("step %d: no time for its evaluation, which is given up", step)
        return None

    def _evaluate(self, step: int, kept: KeptBatches | None) -> _Outcome:
        """Evaluate a step; `kept` is None on all ranks but the first."""
        kept = kept or KeptBatches(None, step, {})
        losses: dict[str, float] = {}
        try:
            device = self._rounds.world.device
            # On every rank, in and out: bringing sharded weights up to date is a collective.
            with self._ema.swapped_in(), products_in("fp32", device), one_thread(device):
                if self._held_out_loss:
                    masks = step - 1
                    losses = self._held_out_loss.measure(self._network, self._rounds, masks)
                self._draw(step, kept)
            self._prepare_reference()
            metrics = self._rounds.on_main(lambda: self._measure.metrics(kept.joined()))
        except CutOffError:
            if kept.batches:
                log.info(
                    "step %d: evaluation cut off; %d batches are kept for the next start",
                    step, len(kept.batches),
                )  # fmt: skip
            return _Outcome(self._rounds.leave_reason(), kept.num_added)
        except FailedError as error:
            if self._rounds.world.is_main:
                self._tell_failure(step, str(error))
        else:
            self._finish(step, {**losses, **(metrics or {})}, kept)
        kept.remove()
        return _Outcome(None, kept.num_added)

    def _draw(self, step: int, kept: KeptBatches) -> None:
        """Draw the batches that are missing, as many on every rank; rank 0 keeps them."""
        world = self._rounds.world
        numbers = range(-(-self._num_samples // self._batch_size))
        # Rank 0 alone knows what is kept. All must draw the same batches.
        missing = world.broadcast_object([n for n in numbers if n not in kept.batches])
        told = f"step {step}: sampling steps of {len(missing)} batches"
        with _Sampling(self._rounds, told, -(-len(missing) // world.world_size)) as sampling:
            self._progress = sampling
            self._draw_missing(missing, step, kept)

    def _draw_missing(self, missing: list[int], step: int, kept: KeptBatches) -> None:
        world = self._rounds.world
        for i in range(0, len(missing), world.world_size):
            # Past the last one a rank draws it again, and nobody counts that.
            mine = missing[min(i + world.rank, len(missing) - 1)]
            counts = i + world.rank < len(missing)
            arrays = {}
            with self._rounds.joint():
                start = mine * self._batch_size
                x_start = self._draw_batch(range(start, start + self._batch_size), step)
                indices = range(start, min(start + self._batch_size, self._num_samples))
                if counts:
                    arrays = self._measure.reduce(x_start[: len(indices)], indices)
            # Unequal in the last round, of fewer batches than ranks, and on all ranks but 0, where
            # nothing is gathered.
            for number, found in zip(missing[i:], self._rounds.gathered(arrays), strict=False):
                kept.add(number, found)

    def _draw_batch(self, batch: range, step: int) -> torch.Tensor:
        return draw_samples(
            self._network,
            self._settings,
            batch,
            batch_size=self._batch_size,
            conditions=self._conditions,
            null_condition=self._null_condition,
            step=step - 1,  # the masks that were trained last, if they roam
            progress=self._progress,
        )

    def _prepare_reference(self) -> None:
        """Compute the reference's moments together, the first time that they are needed."""
        reference, world = self._measure.reference, self._rounds.world
        if reference is None:
            return
        for extractor in self._measure.extractors:
            known = False
            with self._rounds.joint():
                known = world.is_main and reference.has_moments(extractor)
            if not world.broadcast_object(known):
                if world.is_main:
                    log.info(
                        "computing the moments of %s by %s, once",
                        reference.pictures.source, extractor.name,
                    )  # fmt: skip
                sums = self._summed(reference, extractor)
                with self._rounds.joint():
                    if world.is_main:
                        reference.keep_moments(extractor, sums.moments)

    def _summed(self, reference: Reference, extractor: Extractor) -> FeatureSums:
        """Return on rank 0 the sums over all pictures, whose batches are dealt to all ranks."""
        world, sums = self._rounds.world, FeatureSums()
        size = extractor.batch_size
        mine = reference.pictures.share(size, world.rank, world.world_size)
        num_batches = -(-len(reference.pictures) // size)
        bar = ProgressBar("batches of the reference", num_batches, shown=world.is_main)
        for _ in range(0, num_batches, world.world_size):
            features = None
            with self._rounds.joint():
                if (pictures := next(mine, None)) is not None:
                    features = extractor.features(pictures)
            for found in self._rounds.gathered(features):
                if found is not None:
                    sums.add(found)
                    bar.advance()
        bar.close()
        return sums

    def _finish(self, step: int, figures: Record, kept: KeptBatches) -> None:
        """Publish on rank 0 what was found; a failure there is told."""
        if self._run_dir is None or self._samples_dir is None:
            return
        try:
            self._publish(step, figures, kept, self._run_dir, self._samples_dir)
        except Exception as error:  # no figure is worth the run
            self._tell_failure(step, message(error))

    def _publish(
        self, step: int, figures: Record, kept: KeptBatches, run_dir: Path, samples_dir: Path
    ) -> None:
        measure, manifest = self._measure, self._manifest(step)
        path = samples_dir / f"step_{step:08d}{measure.ending}"
        open_folder(samples_dir).write_bytes(path.name, measure.picture(kept.joined()))
        # A job may have been killed after it wrote this, and before it removed what it had kept.
        if figures and not is_newest_report(run_dir, figures, manifest):
            write_report(run_dir, figures, manifest)
        told = "".join(f"{key} {value:.4g}, " for key, value in _headline(figures).items())
        log.info("step %d: %ssamples in %s", step, told, path)
        metric = measure.metric or (LOSS if self._held_out_loss else None)
        picture = path if path.suffix == ".png" else None
        # After the files are written: MLflow's thread reads them.
        self.on_result(Result(step, figures, metric, manifest, picture))

    def _tell_failure(self, step: int, reason: str) -> None:
        log.warning("step %d: evaluation failed, training goes on: %s", step, reason)

    @property
    def _network(self) -> Denoiser:
        network = self._engine.network
        assert isinstance(network, Denoiser)
        return network

    def _kept(self, step: int) -> KeptBatches | None:
        """Return what is kept of a step, on rank 0 of a run."""
        if self._samples_dir is None:
            return None
        plan = {"batch_size": self._batch_size, **self._manifest(step)}
        return KeptBatches(self._samples_dir, step, plan)


class _Sampling:
    """Goes through the sampling steps of rounds, and shows on rank 0 how far they are."""

    def __init__(self, rounds: Rounds, what: str, num_rounds: int) -> None:
        self._rounds = rounds
        self._what = what
        self._num_rounds = num_rounds
        self._bar: ProgressBar | None = None

    def __call__(self, steps: Iterable[int]) -> Iterator[int]:
        of_batch = list(steps)
        if self._bar is None:
            total, shown = self._num_rounds * len(of_batch), self._rounds.world.is_main
            self._bar = ProgressBar(self._what, total, shown=shown)
        for step in self._rounds.steps(of_batch):
            yield step
            self._bar.advance()

    def __enter__(self) -> "_Sampling":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.close()


def _headline(figures: Record) -> Record:
    """Return the figures that a line of the log has room for."""
    return {key: value for key, value in figures.items() if "_cluster_" not in key}
