"""Build what draws an experiment's samples, of a trained run and in the middle of training."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dtr_scale.config.schema import Experiment
from dtr_scale.data.manifest import read_manifest
from dtr_scale.engines.wrap import compile_blocks, is_compiled
from dtr_scale.evaluation.precision import cast, resolve_precision
from dtr_scale.evaluation.sampling import Sampler, SamplingSettings
from dtr_scale.jobs.build import open_samples
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.storage.folder import open_folder

HELD_OUT = "val"
"""The split of the data that is not trained on."""


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
        labels=evaluation.labels,
    )


def build_sampler(
    experiment: Experiment,
    network: Denoiser,
    device: torch.device,
    *,
    conditions: Callable[[range], Tensor] | None,
    null_condition: Tensor | None,
    step: int,
) -> Sampler:
    """Return what draws samples of a network on its device, which is cast, and compiled, for it.

    The other arguments are those of `Sampler`.
    """
    network = cast(network, resolve_precision(experiment.evaluation.precision, device))
    if samples_compiled(experiment, device):
        # A graph for each batch size, with and without guidance. Which of two graphs would take a
        # batch that both accept depends on what this rank has drawn before, and so would its bytes.
        compile_blocks(network.routed_blocks(), dynamic=False)
    return Sampler(
        network,
        sampling_settings(experiment),
        conditions=conditions,
        null_condition=null_condition,
        step=step,
    )


def samples_compiled(experiment: Experiment, device: torch.device) -> bool:
    """Tell whether the network's blocks are compiled: as training's on one rank of this device."""
    # Not by how much there is to do: samples would depend on their number.
    return is_compiled(experiment.engine.compile, device)


def sampling_conditions(
    experiment: Experiment,
) -> tuple[Callable[[range], Tensor], Tensor] | tuple[None, None]:
    """Return what gives the texts of samples, the reference split's in order, and the null text.

    None for classes.
    """
    if experiment.model.conditioning != "text":
        return None, None
    samples = open_samples(experiment, reference_split(experiment))
    places = [(shard, i) for shard, size in enumerate(samples.shard_samples) for i in range(size)]

    def texts(indices: range) -> Tensor:
        # By the sample's own index: any rank and batch gives it the same text.
        tokens = [samples.read(*places[index % len(places)])[1] for index in indices]
        return torch.from_numpy(np.stack(tokens))

    return texts, torch.from_numpy(samples.null_condition())


def reference_split(experiment: Experiment) -> str:
    """Return the split that samples are compared with: held out, or train where none is."""
    data = experiment.data
    if data.type == "synthetic":  # any split is made up
        return HELD_OUT
    assert data.shards is not None
    manifest = read_manifest(open_folder(data.shards, data.storage_options), None)
    return HELD_OUT if manifest.split(HELD_OUT) else "train"


def captions_told(experiment: Experiment) -> str:
    """Say which captions samples are drawn for where none are given."""
    is_held_out = reference_split(experiment) == HELD_OUT
    return "held-out captions" if is_held_out else "training captions"
