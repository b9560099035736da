"""Lay out the checkpoint of many ranks: what each holds, stores, and reads at a resume."""

import pickle
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from dtr_scale.checkpoint.layout import (
    BLOCK_BYTES,
    COMPLETE,
    INDEX,
    ITEM_BYTES,
    build_header,
    build_index,
    complete_mark,
    rank_file,
)
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.checkpoint.snapshot import Place, share_out
from dtr_scale.engines.base import ADAM_MOMENTS, MASTER
from dtr_scale.engines.flat_group import ALIGNMENT
from dtr_scale.storage.folder import open_folder

Part = dict[str, nn.Parameter]


class CheckpointFigures(NamedTuple):
    """Of one checkpoint. Seconds are those that a core computed."""

    pieces: int
    agree_bytes: int
    """That each rank is sent, once in a run, to learn who stores what."""
    share_out_seconds: float
    """For each rank to work that out."""
    least_stored: int
    most_stored: int
    """Bytes of the emptiest and the fullest rank's file."""
    index_bytes: int
    index_seconds: float
    """For rank 0, in the thread that saves."""
    open_seconds: float
    """For each rank of a resume to read and verify the index."""


def network_parts(network: nn.Module, blocks: Sequence[nn.Module]) -> list[Part]:
    """Return the parameters outside of blocks, then each block's, by name."""
    owner = {parameter: block for block in blocks for parameter in block.parameters()}
    named = list(network.named_parameters())
    return [{n: p for n, p in named if owner.get(p) is each} for each in (None, *blocks)]


def flat_places(parts: Sequence[Part], world_size: int) -> list[list[tuple[str, int, int]]]:
    """Return what each rank holds under `flat`: equal shares of each part's buffer.

    A place is a parameter's name, the first element and how many.
    """
    held: list[list[tuple[str, int, int]]] = [[] for _ in range(world_size)]
    for part in parts:
        starts, end = [], 0
        for parameter in part.values():
            starts.append(end)
            end += _up(parameter.numel(), ALIGNMENT)
        share = _up(end, ALIGNMENT * world_size) // world_size
        for (name, parameter), start in zip(part.items(), starts, strict=True):
            stop = start + parameter.numel()
            for rank in range(start // share, (stop - 1) // share + 1):
                first = max(start, rank * share)
                held[rank].append((name, first - start, min(stop, (rank + 1) * share) - first))
    return held


def fsdp2_places(
    parts: Sequence[Part], world_size: int, shard: int
) -> list[list[tuple[str, int, int]]]:
    """Return what each rank holds under FSDP2: rows of each parameter, as torch.chunk cuts them."""
    held: list[list[tuple[str, int, int]]] = [[] for _ in range(world_size)]
    for part in parts:
        for name, parameter in part.items():
            rows, of_row = -(-len(parameter) // shard), parameter.numel() // len(parameter)
            for rank in range(world_size):
                first = rank % shard * rows
                count = min(rows, len(parameter) - first)
                if count > 0:
                    held[rank].append((name, first * of_row, count * of_row))
    return held


def measure_checkpoint(
    held: Sequence[Sequence[tuple[str, int, int]]],
    shapes: dict[str, Any],
    averages: int,
    place: Path,
) -> CheckpointFigures:
    """Return the figures of a checkpoint of ranks that hold such places; write its index alone."""
    kinds = (MASTER, *ADAM_MOMENTS, *(f"ema_{i}" for i in range(averages)))
    places = [[(f"{k}/{name}", at, n) for name, at, n in rank for k in kinds] for rank in held]
    agreed = sum(len(pickle.dumps(each)) for each in places)
    began = time.process_time()
    owners = share_out(places)
    shared = time.process_time() - began
    entries = list(_entries(owners, shapes, len(held)))
    began = time.process_time()
    index = build_index(entries, {})
    built = time.process_time() - began
    folder = open_folder(place)
    folder.write_bytes(INDEX, index)
    folder.write_bytes(COMPLETE, complete_mark(index))
    began = time.process_time()
    CheckpointReader(folder)
    return CheckpointFigures(
        pieces=len(owners),
        agree_bytes=agreed,
        share_out_seconds=shared,
        least_stored=min(entry["bytes"] for entry in entries),
        most_stored=max(entry["bytes"] for entry in entries),
        index_bytes=len(index),
        index_seconds=built,
        open_seconds=time.process_time() - began,
    )


def _entries(
    owners: dict[Place, int], shapes: dict[str, Any], world_size: int
) -> Iterator[dict[str, Any]]:
    """Yield what the index is told of each rank's file."""
    stored: list[dict[str, tuple[int, int]]] = [{} for _ in range(world_size)]
    for (key, offset, numel), rank in owners.items():
        stored[rank][key] = offset, numel
    for rank, mine in enumerate(stored):
        header, starts = build_header({key: numel for key, (_, numel) in mine.items()})
        size = len(header) + ITEM_BYTES * sum(numel for _, numel in mine.values())
        yield {
            "file": rank_file(rank),
            "bytes": size,
            "blocks": [f"{rank:016x}"] * -(-size // BLOCK_BYTES),
            "pieces": {
                key: {
                    "shape": shapes[key.partition("/")[2]],
                    "offset": offset,
                    "numel": numel,
                    "start_byte": starts[key],
                }
                for key, (offset, numel) in mine.items()
            },
        }


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
