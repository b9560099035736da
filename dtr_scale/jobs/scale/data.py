"""Measure what one of many ranks does with the description of a large data set."""

import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dtr_scale.data.manifest import MANIFEST_NAME, Manifest, Shard, read_manifest, write_manifest
from dtr_scale.data.order import GlobalOrder, lane_major
from dtr_scale.storage.folder import open_folder

_STEPS = 20


class DataSize(NamedTuple):
    """How much data there is, and how ranks share its order."""

    shards: int
    samples: int
    global_batch_size: int
    world_size: int
    ranks_of_a_node: int
    num_lanes: int
    window_shards: int


class RankFigures(NamedTuple):
    """What a rank takes of its core and memory. Seconds are those that its process computed."""

    manifest_seconds: float
    first_slice_seconds: float
    """From the manifest to the rank's samples of a step in the middle of the run."""
    slice_seconds: float
    """For each step after it."""
    ahead_seconds: float
    """To list what the node's cache will need until the epoch after ends."""
    peak_bytes: int
    """Beyond what the process takes once everything is imported."""


def write_large_manifest(folder: Path, size: DataSize, sample_bytes: int) -> int:
    """Write the manifest of shards that are not there; return its bytes."""
    each = size.samples // size.shards
    shards = tuple(
        Shard(
            name=f"train_{i:06d}.tar",
            split="train",
            samples=each,
            bytes=each * sample_bytes,
            # Hashes do not repeat, or strings would be shared.
            sha256=f"{i:064x}",
            index_sha256=f"{size.shards + i:064x}",
        )
        for i in range(size.shards)
    )
    manifest = Manifest(
        encoding="posterior", shape=(4, 32, 32), dtype="float16", num_classes=1000, shards=shards
    )
    write_manifest(open_folder(folder), manifest)
    return (folder / MANIFEST_NAME).stat().st_size


def measure_ranks(folder: Path, size: DataSize, ranks: Sequence[int]) -> dict[int, RankFigures]:
    """Return the figures of some ranks, each in a process of its own, one after the other."""
    spawning = multiprocessing.get_context("spawn")
    found = {}
    for rank in ranks:
        with spawning.Pool(1) as pool:
            found[rank] = pool.apply(_measure, (folder, size, rank))
    return found


def _measure(folder: Path, size: DataSize, rank: int) -> RankFigures:
    before, began = _peak_bytes(), time.process_time()
    manifest = read_manifest(open_folder(folder))
    # As a run does: it tells the data by this hash.
    manifest.hash("train")
    read = time.process_time()
    sizes = tuple(shard.samples for shard in manifest.split("train"))
    order = GlobalOrder(sizes, 0, size.window_shards, size.num_lanes)
    by_rank = lane_major(size.global_batch_size, size.num_lanes).reshape(size.world_size, -1)
    first = size.samples // 2 // size.global_batch_size * size.global_batch_size
    order.samples(first + by_rank[rank])
    sliced = time.process_time()
    for step in range(1, _STEPS + 1):
        order.samples(first + step * size.global_batch_size + by_rank[rank])
    stepped = time.process_time()
    node = rank // size.ranks_of_a_node * size.ranks_of_a_node
    lanes = np.unique(by_rank[node : node + size.ranks_of_a_node] % size.num_lanes).tolist()
    order.shards_of_two_windows(first, lanes)
    order.shards_ahead(first, lanes)
    return RankFigures(
        manifest_seconds=read - began,
        first_slice_seconds=sliced - read,
        slice_seconds=(stepped - sliced) / _STEPS,
        ahead_seconds=time.process_time() - stepped,
        peak_bytes=_peak_bytes() - before,
    )


def _peak_bytes() -> int:
    """Return the most memory that this process has ever held (VmHWM)."""
    fields: dict[str, Any] = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    return int(fields["VmHWM"].split()[0]) * 1024
