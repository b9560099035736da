"""A rank's part of a checkpoint in host memory, so that training goes on while it is written."""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from dtr_scale.checkpoint import layout
from dtr_scale.checkpoint.layout import ITEM_BYTES, Piece, build_header
from dtr_scale.engines.world import World

log = logging.getLogger(__name__)


class Snapshot:
    """A rank's whole file, header and all, in memory that is set aside once and filled anew.

    The pieces given at the start say which keys it holds and how large they are.
    """

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        header, starts = build_header({k: p.data.numel() for k, p in pieces.items()})
        num_bytes = len(header) + ITEM_BYTES * sum(p.data.numel() for p in pieces.values())
        self._bytes = _set_aside(num_bytes)
        self.data[: len(header)] = header
        self._places = {
            key: {
                "shape": piece.shape,
                "offset": piece.offset,
                "numel": piece.data.numel(),
                "start_byte": starts[key],
            }
            for key, piece in pieces.items()
        }

    @property
    def data(self) -> memoryview:
        """The bytes of the file, a valid safetensors file."""
        return self._bytes.numpy().data

    def take(self, state: Mapping[str, Piece]) -> None:
        """Copy the state as it is now; what `data` showed before is gone."""
        for key, place in self._places.items():
            start, piece = place["start_byte"], state[key]
            assert (piece.offset, piece.data.numel()) == (place["offset"], place["numel"]), key
            room = self._bytes[start : start + ITEM_BYTES * place["numel"]]
            room.view(torch.float32).copy_(piece.data, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    def entry(self, file: str) -> dict[str, Any]:
        """Return what the index says of this rank's file: size, block hashes, pieces."""
        data, block_bytes = self.data, layout.BLOCK_BYTES
        # xxh3 lets go of the GIL for each block, and so does the single write after it.
        blocks = [
            xxhash.xxh3_64_hexdigest(data[start : start + block_bytes])
            for start in range(0, len(data), block_bytes)
        ]
        return {"file": file, "bytes": len(data), "blocks": blocks, "pieces": self._places}


def _set_aside(num_bytes: int) -> torch.Tensor:
    """Return uint8 [num_bytes]; where memory is short, of a file that the kernel may write out."""
    if num_bytes > available_memory() // 2:
        log.info("memory is short: saves copy %.1f GB into a temporary file", num_bytes / 1e9)
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return torch.from_numpy(np.memmap(file, np.uint8, "r+", shape=(num_bytes,)))
    # Page-locked, or copies from a GPU would be slow and hold up its stream.
    room = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return room.zero_()  # touched now: the kernel takes seconds to find 2 GB of pages


def available_memory() -> int:
    """Return the bytes that new allocations may take without swapping, as Linux estimates it."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def own_share(state: Mapping[str, Piece], world: World) -> dict[str, Piece]:
    """Return the pieces that this rank stores: each piece once, replicas spread over the ranks.

    Every rank calls it.
    """
    mine = {(key, piece.offset, piece.data.numel()): piece for key, piece in state.items()}
    everyone = world.all_gather_object(dict.fromkeys(mine))
    load = [0] * world.world_size
    owner: dict[tuple[str, int, int], int] = {}
    for place in dict.fromkeys(place for held in everyone for place in held):
        holders = [rank for rank, held in enumerate(everyone) if place in held]
        owner[place] = min(holders, key=lambda rank: load[rank])
        load[owner[place]] += place[2]
    return {place[0]: piece for place, piece in mine.items() if owner[place] == world.rank}
