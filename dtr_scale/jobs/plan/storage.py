"""Count what a run keeps: checkpoints, shards, and each node's cache of them."""

import math
from dataclasses import dataclass
from pathlib import Path

from dtr_scale.config.schema import Experiment
from dtr_scale.data.cache import GIB
from dtr_scale.data.manifest import Manifest, read_manifest
from dtr_scale.errors import DataError
from dtr_scale.storage.folder import open_folder

SHARD_BYTES = 256e6
"""Of `dtr-scale prepare` unless it is told otherwise."""
_PREFETCH = 4
_NOISE_BYTES = 4


@dataclass(frozen=True)
class Storage:
    """Bytes by what they are for."""

    checkpoint: int
    num_checkpoints: int
    """At the end of the run: the last, those kept for ever, and one that is being written."""
    sample: int
    """As it is stored in a shard."""
    num_samples: int | None
    """Of the prepared data, where it is on this machine."""
    windows: float
    """Of shards that a node reads from at a time."""
    cache: float
    """The most that a node keeps of the shards."""
    shared_memory: float
    """/dev/shm of a node, for micro-batches that are read ahead."""

    @property
    def checkpoints(self) -> int:
        return self.checkpoint * self.num_checkpoints

    @property
    def shards(self) -> int | None:
        return self.sample * self.num_samples if self.num_samples else None


def storage_of(
    experiment: Experiment, checkpoint: int, *, ranks: int, micro_batch_size: int
) -> Storage:
    """Return what an experiment stores, with `ranks` on a node and checkpoints of so many bytes."""
    keep, data = experiment.checkpoint, experiment.data
    kept_for_ever = experiment.train.max_steps // keep.keep_every if keep.keep_every else 0
    manifest = _manifest(experiment)
    shard_bytes = SHARD_BYTES
    if manifest is not None:
        shard_bytes = max(shard.bytes for shard in manifest.split("train"))
    numbers = math.prod(_sample_shape(experiment))
    slot = micro_batch_size * 2 * _NOISE_BYTES * numbers  # x_start and noise, fp32
    windows = 2 * data.window_shards * min(data.num_lanes, ranks) * shard_bytes
    return Storage(
        checkpoint=checkpoint,
        num_checkpoints=keep.keep_last + kept_for_ever + keep.keep_best + 1,
        sample=_sample_bytes(experiment, manifest),
        num_samples=manifest.num_samples("train") if manifest else None,
        windows=windows,
        cache=data.cache_gb * GIB,
        shared_memory=ranks * (data.num_workers * _PREFETCH + 1) * slot,
    )


def _sample_shape(experiment: Experiment) -> tuple[int, int, int]:
    model = experiment.model
    return model.in_channels, model.input_size, model.input_size


def _sample_bytes(experiment: Experiment, manifest: Manifest | None) -> int:
    """Return the bytes of a sample's numbers; of latents mean and deviation, twice, in fp16."""
    if manifest is not None:
        split = manifest.split("train")
        return sum(s.bytes for s in split) // max(1, sum(s.samples for s in split))
    model = experiment.model
    numbers = math.prod(_sample_shape(experiment))
    stored = numbers if model.type == "adm" else 2 * 2 * 2 * numbers  # pixels are uint8
    if model.type == "dit" and model.conditioning == "text":
        stored += 2 * model.context_length * model.context_dim
    return stored


def _manifest(experiment: Experiment) -> Manifest | None:
    """Return the manifest of prepared data that is on this machine; a plan asks no bucket."""
    shards = experiment.data.shards
    if experiment.data.type != "shards" or not shards or "://" in shards:
        return None
    if not Path(shards).is_dir():
        return None
    try:
        return read_manifest(open_folder(shards))
    except DataError:
        return None
