"""Build a trainer and its parts from an experiment: the composition root.

Here the config's sections meet the components, which take keyword arguments. `jobs/sampling.py`
does the same for samples and `jobs/tracking.py` for MLflow.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import dtr_scale
from dtr_scale.checkpoint.manager import CheckpointManager
from dtr_scale.checkpoint.retention import Keep
from dtr_scale.config.load import resolved
from dtr_scale.config.schema import EngineConfig, Experiment, TrainConfig
from dtr_scale.data.batch import BatchAssembler
from dtr_scale.data.cache import GIB
from dtr_scale.data.loader import BatchLoader
from dtr_scale.data.manifest import read_manifest
from dtr_scale.data.order import GlobalOrder
from dtr_scale.data.reader import SampleReader, Samples
from dtr_scale.data.synthetic import SyntheticSource
from dtr_scale.diffusion.clusters import log_snr_clusters, timestep_clusters
from dtr_scale.diffusion.process import GaussianDiffusion
from dtr_scale.diffusion.timesteps import TimestepSampler, timestep_strata
from dtr_scale.engines.base import AdamSettings, Engine
from dtr_scale.engines.deepspeed_config import build_deepspeed_config
from dtr_scale.engines.flat import FlatEngine
from dtr_scale.engines.freeze import freeze
from dtr_scale.engines.fsdp2 import Fsdp2Engine
from dtr_scale.engines.graphs import CudaGraphs
from dtr_scale.engines.single import SingleEngine
from dtr_scale.engines.world import World
from dtr_scale.engines.wrap import checkpoint_activations, compile_blocks, is_compiled
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.jobs.alike import refuse_other_data
from dtr_scale.models import build as networks
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.experts import expert_timesteps
from dtr_scale.objectives.objective import build_objective
from dtr_scale.storage.folder import open_folder
from dtr_scale.train.ema import ConstantDecay, Ema, EmaProfile, PowerFunction
from dtr_scale.train.guard import UpdateGuard
from dtr_scale.train.learning_rate import LearningRate
from dtr_scale.train.run_dir import CHECKPOINTS
from dtr_scale.train.trainer import Trainer

log = logging.getLogger(__name__)

_SYNTHETIC_SAMPLES = 2**16
RESHARDED_PARAMETERS = 10**9


def build_trainer(experiment: Experiment, world: World) -> Trainer:
    """Return the trainer of an experiment, at step 0."""
    train, objective = experiment.train, experiment.objective
    with world.agree():
        # Storage can fail on one rank alone, which the next collective would wait for.
        micro_batch_size = experiment.micro_batch_size(world.world_size)
        samples = open_samples(experiment)
        if world.is_main and isinstance(samples, SampleReader):
            # On rank 0, so that a thousand ranks do not list the same folder.
            samples.check_sizes()
            _tell_large_batch(experiment, sum(samples.shard_samples))
    refuse_other_data(world, experiment.data.shards, samples.manifest.hash("train"))
    diffusion = build_diffusion(experiment)
    loader = BatchLoader(
        build_assembler(experiment, samples),
        micro_batch_size=micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        node_ranks=world.node_ranks,
        num_workers=experiment.data.num_workers,
    )
    compiles = compiles_blocks(experiment, world)
    engine = _build_engine(experiment, world, micro_batch_size, loader.grad_accum_steps, compiles)
    return Trainer(
        world=world,
        engine=engine,
        objective=build_objective(
            objective.type,
            num_clusters=objective.num_clusters,
            global_batch_size=train.global_batch_size,
            device=world.device,
            gamma=objective.gamma,
            k=objective.k,
            lr=objective.lr,
        ),
        diffusion=diffusion,
        timesteps=build_timesteps(experiment, diffusion),
        loader=loader,
        ema=Ema(engine, _ema_profiles(train)),
        guard=UpdateGuard(
            spike_factor=train.spike_factor,
            rollback_after=train.rollback_after,
            max_rollbacks=train.max_rollbacks,
        ),
        checkpoints=open_checkpoints(experiment, world),
        # Saved with every checkpoint; a resume compares it (`jobs/resume.py`).
        meta={
            "config": resolved(experiment),
            "version": dtr_scale.__version__,
            "torch": torch.__version__,
            "world_size": world.world_size,
            "manifest_hash": samples.manifest.hash("train"),
        },
        global_batch_size=train.global_batch_size,
        max_steps=train.max_steps,
        lr=_learning_rate(train),
        log_every=train.log_every,
        save_every=experiment.checkpoint.every_steps,
        compile_loss=compiles,
        evaluate_every=experiment.evaluation.every_steps,
    )


def _learning_rate(train: TrainConfig) -> LearningRate:
    return LearningRate(
        train.lr,
        train.max_steps,
        train.schedule,
        warmup_steps=train.warmup_steps,
        # "wsd" alone reads it: a tenth of the steps unless given.
        decay_steps=train.decay_steps or max(train.max_steps // 10, 1),
        final=train.final_lr,
    )


def _ema_profiles(train: TrainConfig) -> list[EmaProfile]:
    return [
        # The first is the average that samples are drawn with.
        ConstantDecay(train.ema_decay, is_first=True),
        *(ConstantDecay(decay) for decay in train.ema_decays),
        *(PowerFunction(sigma_rel) for sigma_rel in train.ema_sigma_rel),
    ]


def build_diffusion(experiment: Experiment) -> GaussianDiffusion:
    """Return the diffusion that an experiment trains on, with all its timesteps."""
    return GaussianDiffusion(
        experiment.diffusion.noise_schedule,
        experiment.diffusion.num_timesteps,
        learn_sigma=experiment.model.learn_sigma,
    )


def build_network(experiment: Experiment) -> Denoiser:
    """Return the network of an experiment, initialised from its seed.

    Every rank builds all of it on the CPU, so that it is the same at every world size and under
    every engine; those that shard free what they do not keep.
    """
    torch.manual_seed(experiment.train.seed)
    return networks.build_network(
        **experiment.model.model_dump(), num_timesteps=experiment.diffusion.num_timesteps
    )


def open_samples(experiment: Experiment, split: str = "train") -> Samples:
    """Return the samples of a split; ConfigError if the network does not fit them."""
    model, data = experiment.model, experiment.data
    shape = (model.in_channels, model.input_size, model.input_size)
    context_shape = None
    if model.type == "dit" and model.conditioning == "text":
        context_shape = model.context_length, model.context_dim
    if data.type == "synthetic":
        return SyntheticSource(
            shape,
            model.num_classes,
            _SYNTHETIC_SAMPLES,
            seed=experiment.train.seed,
            context_shape=context_shape,
        )
    assert data.shards is not None
    folder = open_folder(data.shards, data.storage_options)
    try:
        manifest = read_manifest(folder, split)
    except DataError as error:
        raise DataError(f"data.shards: {error}") from error
    if manifest.shape != shape:
        raise ConfigError(
            f"model.in_channels and model.input_size make samples {list(shape)}, the manifest in "
            f"{data.shards} has {list(manifest.shape)}; change the model or data.shards"
        )
    if context_shape != manifest.context_shape:
        raise ConfigError(
            f"model.conditioning = {model.conditioning!r} needs texts of shape {context_shape}, "
            f"the manifest in {data.shards} has {manifest.context_shape}; change "
            "model.conditioning, model.context_length and model.context_dim, or data.shards"
        )
    if model.conditioning == "class" and manifest.num_classes != model.num_classes:
        raise ConfigError(
            f"model.num_classes = {model.num_classes}, the manifest in {data.shards} has "
            f"{manifest.num_classes}; set --model.num_classes={manifest.num_classes}"
        )
    return SampleReader(
        folder,
        manifest,
        split,
        window_shards=data.window_shards,
        cache_dir=Path(data.cache_dir) if data.cache_dir else None,
        cache_max_bytes=int(data.cache_gb * GIB),
    )


def open_checkpoints(experiment: Experiment, world: World) -> CheckpointManager:
    """Return the manager of a run's checkpoints, local or s3://."""
    checkpoint = experiment.checkpoint
    place = checkpoint.dir or experiment.run_path / CHECKPOINTS
    return CheckpointManager(
        # run_dir is a local folder, which takes no keys: checkpoint.dir alone may be on S3.
        open_folder(place, experiment.data.storage_options if checkpoint.dir else None),
        world=world,
        keep=Keep(
            last=checkpoint.keep_last,
            every=checkpoint.keep_every,
            best=checkpoint.keep_best,
            metric=checkpoint.best_metric,
        ),
        max_failures=checkpoint.max_failures,
    )


def build_timesteps(experiment: Experiment, diffusion: GaussianDiffusion) -> TimestepSampler:
    """Return what draws an experiment's timesteps."""
    return TimestepSampler(
        seed=experiment.train.seed,
        boundaries=_cluster_boundaries(experiment, diffusion),
        global_batch_size=experiment.train.global_batch_size,
    )


def _cluster_boundaries(experiment: Experiment, diffusion: GaussianDiffusion) -> np.ndarray:
    """Return what `TimestepSampler` draws in: ant_uw's clusters, equal strata for the others."""
    model, objective = experiment.model, experiment.objective
    num_timesteps, num_clusters = diffusion.num_timesteps, objective.num_clusters
    # An expert trains its own interval, so its clusters share that and begin at its start.
    timesteps = range(num_timesteps)
    if model.expert is not None:
        timesteps = expert_timesteps(model.expert, model.num_experts, num_timesteps)
    if objective.type != "ant_uw":
        return timestep_strata(timesteps, num_clusters)
    if objective.clusters == "log_snr":
        snr = diffusion.snr(torch.tensor(timesteps)).numpy()
        return timesteps.start + log_snr_clusters(snr, num_clusters)
    if objective.clusters == "gradient":
        # Measured over all timesteps by `dtr-scale affinity`, and used as they are.
        return np.array(objective.boundaries)
    return timesteps.start + timestep_clusters(len(timesteps), num_clusters)


def build_assembler(experiment: Experiment, samples: Samples) -> BatchAssembler:
    """Return what makes the micro-batches of an experiment."""
    train, data, model = experiment.train, experiment.data, experiment.model
    return BatchAssembler(
        samples,
        GlobalOrder(samples.shard_samples, train.seed, data.window_shards, data.num_lanes),
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        draw_timesteps=build_timesteps(experiment, build_diffusion(experiment)),
        conditioning=model.conditioning,
        class_dropout_prob=model.class_dropout_prob,
        horizontal_flip=data.horizontal_flip,
    )


def _build_engine(
    experiment: Experiment,
    world: World,
    micro_batch_size: int,
    grad_accum_steps: int,
    compiles: bool,
) -> Engine:
    config, train = experiment.engine, experiment.train
    network = build_network(experiment)
    freeze(network, train.freeze)
    if world.is_main and (caution := caution_of(experiment)):
        log.warning("%s", caution)
    if not compiles and world.is_main:
        _tell_not_compiled(config, world)
    if compiles:
        # Before an engine wraps the blocks: each is one graph then, under FSDP2 and ZeRO 0-2.
        compile_blocks(network.routed_blocks())
    if config.activation_checkpointing:
        checkpoint_activations(network.routed_blocks())
    optimizer: AdamSettings = {
        "lr": train.lr,
        "weight_decay": train.weight_decay,
        "decayed": train.decayed,
        "betas": train.betas,
        "eps": train.eps,
    }
    step: Any = {"grad_clip": train.grad_clip, "precision": config.precision}
    match config.type:
        case "single" if not casts_weights_once(experiment, world.device):
            return SingleEngine(network, device=world.device, **optimizer, **step)
        case "single" | "flat":
            return FlatEngine(
                network,
                blocks=network.routed_blocks(),
                world=world,
                compiled=compiles,
                graphs=_graphs(config, world.device),
                exchange=config.exchange,
                **optimizer,
                **step,
            )
        case "fsdp2":
            replicate, shard = config.mesh(world.world_size)
            return Fsdp2Engine(
                network,
                blocks=network.routed_blocks(),
                world=world,
                replicate=replicate,
                shard=shard,
                reshard_after_forward=reshards(config, network),
                exchange=config.exchange,
                **optimizer,
                **step,
            )
        case "deepspeed":
            from dtr_scale.engines.zero import DeepSpeedEngine

            keeps_masters = config.zero_stage == 0 and casts_weights_once(experiment, world.device)
            settings = build_deepspeed_config(
                config.deepspeed_config,
                global_batch_size=train.global_batch_size,
                micro_batch_size=micro_batch_size,
                grad_accum_steps=grad_accum_steps,
                zero_stage=config.zero_stage,
                keeps_masters=keeps_masters,
                exchange=config.exchange,
                **step,
            )
            return DeepSpeedEngine(
                network, world=world, config=settings, keeps_masters=keeps_masters, **optimizer
            )


def compiles_blocks(experiment: Experiment, world: World) -> bool:
    """Tell whether a training compiles the network's blocks. Every rank calls it.

    All ranks do or none: compiled blocks round otherwise.
    """
    config = experiment.engine
    # Under ZeRO-3 they fall into 16 graphs with 35 breaks, which gains little.
    if config.type == "deepspeed" and config.zero_stage == 3:
        return False
    return all(world.all_gather_object(is_compiled(config.compile, world.device)))


def casts_weights_once(experiment: Experiment, device: torch.device) -> bool:
    """Tell whether "single" and ZeRO-0 keep bf16 weights: in bf16 on a GPU, else they autocast.

    Weights are cast once a step then, and "single" is the flat engine with one rank. Autocast casts
    them in every forward, a kernel apiece; on a CPU that costs little, and keeps the networks' own
    fp32 parts in fp32.
    """
    return experiment.engine.precision == "bf16" and device.type == "cuda"


def _graphs(config: EngineConfig, device: torch.device) -> CudaGraphs | None:
    """Return what makes CUDA graphs of micro-steps; ConfigError where that cannot be."""
    if config.cuda_graphs is not True:  # "auto" waits for figures of a GPU
        return None
    if device.type != "cuda":
        raise ConfigError(
            f"engine.cuda_graphs = true: there are none on this device ({device}); set "
            "engine.cuda_graphs=false"
        )
    return CudaGraphs(device)


def reshards(config: EngineConfig, network: nn.Module) -> bool:
    """Tell whether FSDP2 drops what it has gathered for a forward, to gather it again."""
    if config.reshard_after_forward != "auto":
        return config.reshard_after_forward
    # bf16 weights of a smaller network are at most 2 GB; gathering them twice costs more.
    return sum(parameter.numel() for parameter in network.parameters()) >= RESHARDED_PARAMETERS


def _tell_not_compiled(config: EngineConfig, world: World) -> None:
    """Warn where blocks are not compiled and that is not what was asked for, or costs speed."""
    if config.compile is True:
        log.warning(
            "engine.compile has no effect under ZeRO-3, which gathers weights inside the "
            "blocks; set engine.compile=false, or engine.type=fsdp2 to shard and compile"
        )
    elif config.compile == "auto" and world.device.type == "cuda" and config.zero_stage < 3:
        log.warning(
            "engine.compile = 'auto': blocks are not compiled, which costs speed: a node lacks a C "
            "compiler or Python's headers; install gcc, g++ and python3-dev"
        )


def _tell_large_batch(experiment: Experiment, num_samples: int) -> None:
    batch_size = experiment.train.global_batch_size
    if batch_size > num_samples:
        log.warning(
            "train.global_batch_size = %d is more than the %d samples of %s: each step sees each "
            "of them %.1f times; a smaller batch makes as good a step in less time",
            batch_size,
            num_samples,
            experiment.data.shards,
            batch_size / num_samples,
        )


def caution_of(experiment: Experiment) -> str | None:
    """Return what is known to speak against an experiment, None if nothing is."""
    model = experiment.model
    # By what is trained, not by a file's name: an override makes the same network of any file.
    if model.title.startswith("DiT-XL") and model.routing.type in ("dtr", "dtr_eq4"):
        return (
            "DTR made DiT-XL worse in the authors' own later table: FID 10.85 against 9.40 of "
            "plain DiT-XL, after 400K steps without loss weights"
        )
    return None
