"""Build what draws an experiment's samples: of a trained run, and in the middle of training."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dtr_scale.config.schema import Experiment
from dtr_scale.data.reader import SampleReader, Samples
from dtr_scale.evaluation.report import has_pixel_metrics
from dtr_scale.evaluation.sampling import SamplingSettings
from dtr_scale.jobs.build import open_samples
from dtr_scale.train.evaluate import PeriodicEvaluation
from dtr_scale.train.run_dir import SAMPLES, RunDirectory
from dtr_scale.train.trainer import Trainer


def sampling_settings(experiment: Experiment) -> SamplingSettings:
    """Return how an experiment's evaluation draws samples."""
    evaluation = experiment.evaluation
    return SamplingSettings(
        noise_schedule=experiment.diffusion.noise_schedule,
        num_timesteps=experiment.diffusion.num_timesteps,
        sampler=evaluation.sampler,
        num_sampling_steps=evaluation.num_sampling_steps,
        cfg_scale=evaluation.cfg_scale,
        cfg_channels=evaluation.cfg_channels,
        clip_denoised=evaluation.clip_denoised,
        seed=experiment.train.seed,
        eta=evaluation.eta,
        cfg_interval=evaluation.cfg_interval,
    )


def sampling_conditions(
    experiment: Experiment,
) -> tuple[Callable[[range], Tensor], Tensor] | tuple[None, None]:
    """Return what gives the texts of samples, the held-out split's in order, and the null text.

    None for classes.
    """
    if experiment.model.conditioning != "text":
        return None, None
    samples = open_samples(experiment, "val")
    places = [(shard, i) for shard, size in enumerate(samples.shard_samples) for i in range(size)]

    def texts(indices: range) -> Tensor:
        # By the sample's own index: any rank and batch gives it the same text.
        tokens = [samples.read(*places[index % len(places)])[1] for index in indices]
        return torch.from_numpy(np.stack(tokens))

    return texts, torch.from_numpy(samples.null_condition())


def build_evaluation(
    experiment: Experiment,
    trainer: Trainer,
    run_dir: RunDirectory | None,
    leave_reason: Callable[[], str | None] = lambda: None,
) -> PeriodicEvaluation:
    """Return what samples in the middle of training; rank 0 alone has a `run_dir` to write to.

    Raises ConfigError or DataError now for what would fail at the first evaluation.
    """
    evaluation = experiment.evaluation
    conditions, null_condition = None, None
    if evaluation.every_steps:
        conditions, null_condition = sampling_conditions(experiment)
    periodic = PeriodicEvaluation(
        world=trainer.world,
        engine=trainer.engine,
        ema=trainer.ema,
        settings=sampling_settings(experiment),
        num_samples=evaluation.num_samples,
        batch_size=evaluation.batch_size,
        conditions=conditions,
        null_condition=null_condition,
        # Rank 0 alone measures; all ranks draw.
        held_out=_held_out(experiment, trainer) if run_dir else None,
        folder=run_dir.path / SAMPLES if run_dir else None,
        leave_reason=leave_reason,
    )
    if evaluation.every_steps:
        # What would fail at the first evaluation, hours from here, fails at the start.
        periodic.check()
    return periodic


def _held_out(experiment: Experiment, trainer: Trainer) -> Samples | None:
    """Return the split that samples are compared with, if they will and can be."""
    wanted = experiment.evaluation.every_steps and experiment.data.type == "latents"
    if not wanted or not has_pixel_metrics(trainer.loader.samples):
        return None
    held_out = open_samples(experiment, "val")
    if isinstance(held_out, SampleReader):
        held_out.check_sizes()
    return held_out
