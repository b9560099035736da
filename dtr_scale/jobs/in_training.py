"""Build what evaluates an experiment in the middle of its training."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from dtr_scale.config.schema import Experiment
from dtr_scale.data.batch import BatchAssembler
from dtr_scale.data.order import GlobalOrder
from dtr_scale.engines.world import World
from dtr_scale.errors import DtrScaleError
from dtr_scale.evaluation.batchwise import BatchMeasure
from dtr_scale.evaluation.features import Extractor
from dtr_scale.evaluation.grid import Titles
from dtr_scale.jobs.build import (
    build_diffusion,
    build_timesteps,
    casts_weights_once,
    compiles_blocks,
    open_samples,
)
from dtr_scale.jobs.conditions import Wanted, conditions_of
from dtr_scale.jobs.drawing import device_name
from dtr_scale.jobs.measure import (
    HELD_OUT,
    build_extractors,
    default_features,
    feature_weights,
    features_manifest,
    is_measured_by_pixels,
    open_reference,
    pixels_manifest,
    reference_split,
    samples_manifest,
)
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.prepare.encode import PictureEncoder, decoder_of
from dtr_scale.train.evaluate import PeriodicEvaluation
from dtr_scale.train.held_out import STREAMS, FixedTimesteps, HeldOutLoss
from dtr_scale.train.rounds import Rounds
from dtr_scale.train.run_dir import SAMPLES, RunDirectory
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)

_Part = TypeVar("_Part")


def build_evaluation(
    experiment: Experiment,
    trainer: Trainer,
    run_dir: RunDirectory | None,
    leave_reason: Callable[[], str | None] = lambda: None,
) -> PeriodicEvaluation | None:
    """Return what evaluates in the middle of training, None where nothing is to.

    All ranks call it; rank 0 alone has a `run_dir` to write to. Raises ConfigError, DataError or
    EvaluationError now, on all of them, for what would fail at the first evaluation.
    """
    world, evaluation = trainer.world, experiment.evaluation
    if not evaluation.every_steps:
        return None
    compiled = compiles_blocks(experiment, world)
    decoder = _decoder(experiment, world)
    extractors = _extractors(experiment, world, decoder)
    with world.agree():
        # Storage can fail on one rank alone.
        conditions = conditions_of(experiment, Wanted(), world.device)
        measure, measured = _measure(experiment, decoder, extractors, conditions.titles)
        held_out_loss = _held_out_loss(experiment, world)
        batch_size = min(evaluation.batch_size, evaluation.num_samples)

        def manifest(step: int) -> dict[str, Any]:
            return {
                **samples_manifest(
                    experiment,
                    num_samples=evaluation.num_samples,
                    precision=_precision(experiment, world),
                    averages=[trainer.ema.meta()["ema"]],
                    checkpoints=[trainer.checkpoints.url(step)],
                    step=step,
                ),
                "labels": conditions.told,
                "batch_size": batch_size,
                "compiled": compiled,
                "device": device_name(world.device),
                **measured,
                **({"held_out_loss": held_out_loss.manifest()} if held_out_loss else {}),
            }

        periodic = PeriodicEvaluation(
            rounds=Rounds(world, leave_reason),
            engine=trainer.engine,
            ema=trainer.ema,
            settings=sampling_settings(experiment),
            num_samples=evaluation.num_samples,
            batch_size=batch_size,
            conditions=conditions.of_samples,
            null_condition=conditions.null,
            measure=measure,
            held_out_loss=held_out_loss,
            manifest=manifest,
            run_dir=run_dir.path if run_dir else None,
            samples_dir=run_dir.path / SAMPLES if run_dir else None,
        )
        # What would fail at the first evaluation, hours from here, fails at the start.
        periodic.check()
    return periodic


def _precision(experiment: Experiment, world: World) -> str:
    """Return how the engine's network computes where nothing casts for it."""
    engine = experiment.engine
    autocasts = engine.type == "single" or (engine.type == "deepspeed" and engine.zero_stage == 0)
    if autocasts and not casts_weights_once(experiment, world.device):
        return "fp32"  # as its weights are
    return experiment.engine.precision


def _decoder(experiment: Experiment, world: World) -> PictureEncoder | None:
    """Return what makes pictures of samples, None where they are none and nothing decodes them."""
    channels = experiment.model.in_channels
    if experiment.data.type == "synthetic":
        return None
    with world.agree():
        manifest = open_samples(experiment).manifest
    vae = experiment.evaluation.vae
    if manifest.encoding == "pixels" and vae is None and channels not in (1, 3):
        return None
    decoder = partial(decoder_of, manifest, vae, world.device)
    return _on_all_ranks(world, decoder, required=vae is not None, otherwise="are not decoded")


def _extractors(
    experiment: Experiment, world: World, decoder: PictureEncoder | None
) -> list[Extractor]:
    """Return what measures pictures by features; none where nothing is to, or can."""
    evaluation = experiment.evaluation
    asked = bool(evaluation.features or evaluation.reference)
    if decoder is None and not asked:
        return []
    with world.agree():
        by_pixels = decoder is not None and is_measured_by_pixels(experiment)
    if by_pixels and not asked:
        return []
    weights = feature_weights(evaluation)
    # By rank 0: weights may lie on some of the nodes alone.
    names = world.broadcast_object(list(evaluation.features) or default_features(weights))
    build = partial(build_extractors, names, weights, world.device)
    return _on_all_ranks(world, build, required=asked, otherwise="are not measured") or []


def _on_all_ranks(
    world: World, build: Callable[[], _Part], *, required: bool, otherwise: str
) -> _Part | None:
    """Return a part that every rank has built; None if one cannot and it is not `required`."""
    part: _Part | None = None
    problem: DtrScaleError | None = None
    try:
        part = build()
    except DtrScaleError as error:
        problem = error
    found = next(filter(None, world.all_gather_object(problem)), None)
    if found is None:
        return part
    if required:
        found.on_every_rank = True
        raise found
    if world.is_main:
        log.warning("samples %s in training: %s", otherwise, found)
    return None


def _measure(
    experiment: Experiment,
    decoder: PictureEncoder | None,
    extractors: list[Extractor],
    titles: Titles | None,
) -> tuple[BatchMeasure, dict[str, Any]]:
    """Return what measures samples, and what a manifest tells of it."""
    if decoder is None:
        return BatchMeasure(decode=None), {"decoder": None}
    if extractors:
        reference = open_reference(experiment, experiment.evaluation.reference, decoder)
        measure = BatchMeasure(
            decode=decoder.decode,
            titles=titles,
            extractors=extractors,
            reference=reference,
        )
        return measure, features_manifest(decoder, reference, extractors)
    if not is_measured_by_pixels(experiment):
        return BatchMeasure(decode=decoder.decode, titles=titles), {"decoder": None}
    held_out = open_samples(experiment, HELD_OUT)
    measure = BatchMeasure(decode=decoder.decode, titles=titles, held_out=held_out)
    return measure, pixels_manifest(held_out)


def _held_out_loss(experiment: Experiment, world: World) -> HeldOutLoss | None:
    """Return what measures the held-out loss, None where there is no such split."""
    evaluation, train = experiment.evaluation, experiment.train
    if not evaluation.loss_samples or experiment.data.type == "synthetic":
        return None
    if reference_split(experiment) != HELD_OUT:
        if world.is_main:
            log.warning("%s has no split val: no held-out loss is measured", experiment.data.shards)
        return None
    samples = open_samples(experiment, HELD_OUT)
    diffusion = build_diffusion(experiment)
    timesteps = FixedTimesteps(build_timesteps(experiment, diffusion))
    assembler = BatchAssembler(
        samples,
        # Spread over the split by the seed: its first shard may be no fair sample of it.
        GlobalOrder(samples.shard_samples, train.seed, window_shards=1),
        seed=train.seed,
        global_batch_size=evaluation.batch_size,
        draw_timesteps=timesteps,
        conditioning=experiment.model.conditioning,
        stream_prefix=STREAMS,
    )
    return HeldOutLoss(
        assembler=assembler,
        timesteps=timesteps,
        num_draws=evaluation.loss_samples,
        batch_size=evaluation.batch_size,
        diffusion=diffusion,
        split=HELD_OUT,
    )
