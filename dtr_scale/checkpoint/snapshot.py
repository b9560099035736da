"""A rank's part of a checkpoint in host memory, so that training goes on while it is written."""

from collections.abc import Mapping
from typing import Any

import torch
import xxhash

from dtr_scale.checkpoint import layout
from dtr_scale.checkpoint.layout import ITEM_BYTES, Piece, build_header
from dtr_scale.engines.world import World


class Snapshot:
    """A rank's whole file, header and all, in memory that is set aside once and filled anew.

    The pieces given at the start say which keys it holds and how large they are.
    """

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        header, starts = build_header({k: p.data.numel() for k, p in pieces.items()})
        num_bytes = len(header) + ITEM_BYTES * sum(p.data.numel() for p in pieces.values())
        # Page-locked, or copies from a GPU would be slow and hold up its stream.
        self._bytes = torch.empty(
            num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()
        )
        self._bytes.zero_()  # touched now: the kernel takes seconds to find 2 GB of pages
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
