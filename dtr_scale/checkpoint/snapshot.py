"""Hold a rank's part of a checkpoint as it was at one moment, while training goes on."""

import logging
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from dtr_scale.checkpoint import layout
from dtr_scale.checkpoint.layout import ITEM_BYTES, build_header
from dtr_scale.engines.base import Piece
from dtr_scale.engines.world import World

log = logging.getLogger(__name__)


class Snapshot:
    """A rank's whole file, header and all; slices of it are its bytes.

    The pieces given at the start say which keys it holds and how large they are. `copied`: into
    host memory that is set aside once and filled anew. Otherwise slices are read from the state
    itself, which must stand still until they are.

    From a GPU the copy runs on a stream of its own, beside the next forward and backward, which
    read the state and change none of it. Its bytes are those of the moment `take` is called:

    - the copy's stream waits for all that was queued before `take`, the last update among it;
    - what changes the state next comes after `before_change`, which makes it wait for the copy;
    - slices are handed out when the copy is done, so the thread that writes them reads no other;
    - the pieces are held until the next `take`: memory of temporary ones is not used anew before.
    """

    def __init__(self, pieces: Mapping[str, Piece], *, copied: bool = True) -> None:
        self._header, starts = build_header({k: p.data.numel() for k, p in pieces.items()})
        self._places = {
            key: {
                "shape": piece.shape,
                "offset": piece.offset,
                "numel": piece.data.numel(),
                "start_byte": starts[key],
            }
            for key, piece in pieces.items()
        }
        self._num_bytes = len(self._header) + _num_bytes(pieces)
        self._state: Mapping[str, Piece] = {}
        self._copy = _set_aside(self._num_bytes) if copied else None
        self._stream = torch.cuda.Stream() if copied and torch.cuda.is_available() else None
        self._done: torch.cuda.Event | None = None
        if self._copy is not None:
            # Once: keys and sizes stay for the whole run, and so does the header.
            self._copy.numpy()[: len(self._header)] = memoryview(self._header)

    @property
    def is_copy(self) -> bool:
        """Whether the state may change after `take`."""
        return self._copy is not None

    def take(self, state: Mapping[str, Piece]) -> None:
        """Hold the state as it is now; what was held before is gone."""
        for key, place in self._places.items():
            # Engines never move their pieces: header and index tell these places at every save.
            held = (place["offset"], place["numel"])
            assert (state[key].offset, state[key].data.numel()) == held, key
        self._state = state
        if self._stream is None:
            self._fill_copy()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        self._done = torch.cuda.Event()
        with torch.cuda.stream(self._stream):
            self._fill_copy()
            self._done.record()

    def before_change(self) -> None:
        """Let what is queued on the device from here on wait until the state is copied."""
        if self._done:
            self._done.wait()

    def _fill_copy(self) -> None:
        if self._copy is None:
            return
        for key, place in self._places.items():
            start = place["start_byte"]
            room = self._copy[start : start + ITEM_BYTES * place["numel"]]
            # `view` needs bytes aligned to 4: the header is padded to 8.
            room.view(torch.float32).copy_(self._state[key].data, non_blocking=True)

    def __len__(self) -> int:
        return self._num_bytes

    def __getitem__(self, part: slice) -> memoryview:
        start, stop, _ = part.indices(self._num_bytes)
        if self._done:
            self._done.synchronize()
        if self._copy is not None:
            return self._copy[start:stop].numpy().data
        # Composed slice by slice: such a save needs no more memory than a slice.
        room = torch.empty(max(0, stop - start), dtype=torch.uint8)
        header = torch.frombuffer(bytearray(self._header), dtype=torch.uint8)
        _copy_overlap(room, start, header, 0)
        for key, place in self._places.items():
            _copy_overlap(room, start, self._state[key].data.view(torch.uint8), place["start_byte"])
        return room.numpy().data

    def entry(self, file: str) -> dict[str, Any]:
        """Return what the index says of this rank's file: size, block hashes, pieces."""
        # xxh3 lets go of the GIL for each block, as writing does.
        blocks = [
            xxhash.xxh3_64_hexdigest(self[start : start + layout.BLOCK_BYTES])
            for start in range(0, len(self), layout.BLOCK_BYTES)
        ]
        return {"file": file, "bytes": len(self), "blocks": blocks, "pieces": self._places}


def _num_bytes(pieces: Mapping[str, Piece]) -> int:
    return ITEM_BYTES * sum(piece.data.numel() for piece in pieces.values())


def _set_aside(num_bytes: int) -> torch.Tensor:
    """Return uint8 [num_bytes]."""
    # Page-locked, or copies from a GPU would be slow and hold up its stream.
    room = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return room.zero_()  # touched now: the kernel takes seconds to find 2 GB of pages


def _copy_overlap(
    room: torch.Tensor, room_start: int, source: torch.Tensor, source_start: int
) -> None:
    """Copy what two ranges of the file, both uint8, have in common."""
    start = max(room_start, source_start)
    stop = min(room_start + len(room), source_start + len(source))
    if start < stop:
        found = source[start - source_start : stop - source_start]
        room[start - room_start : stop - room_start].copy_(found)


def have_room(pieces: Mapping[str, Piece], world: World) -> bool:
    """Tell whether every node has twice the memory that copies of its ranks' pieces take.

    Every rank calls it.
    """
    wanted = _num_bytes(pieces)
    if torch.cuda.is_available():
        wanted = 1 << (wanted - 1).bit_length()  # page-locked memory comes in powers of two
    everyone = world.all_gather_object((socket.gethostname(), wanted, available_memory()))
    short = False
    for node in {name for name, _, _ in everyone}:
        # Ranks of a node share its memory. Their cgroups may differ; the least counts.
        of_node = [(wanted, free) for name, wanted, free in everyone if name == node]
        needed, free = sum(w for w, _ in of_node), min(f for _, f in of_node)
        if 2 * needed > free and world.is_main:
            log.warning(
                "training will stand still while checkpoints are saved: copies of the state would "
                "take %.1f GB of the %.1f GB free on %s",
                needed / 1e9,
                free / 1e9,
                node,
            )
        short |= 2 * needed > free
    return not short


def available_memory() -> int:
    """Return the bytes that this process may still take without swapping, as Linux tells."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    return min([free, *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield what the limits of containers and schedulers (cgroup v2) leave this process."""
    root = Path("/sys/fs/cgroup")
    own = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    for folder in [root / own, *(root / own).parents]:
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and (text := limit.read_text().strip()) != "max":
            # Page cache counts as used, but the kernel gives it back when memory is asked for.
            cached = re.search(r"^inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)
            yield int(text) - int(used.read_text()) + int(cached[1] if cached else 0)


Place = tuple[str, int, int]
"""Key, offset and number of elements: what makes two ranks' pieces the same one."""


def own_share(state: Mapping[str, Piece], world: World) -> dict[str, Piece]:
    """Return the pieces that this rank stores: each piece once, replicas spread over the ranks.

    Every rank calls it.
    """
    # Ranks that hold the same place hold the same numbers, so any of them may store it.
    mine: list[Place] = [(key, piece.offset, piece.data.numel()) for key, piece in state.items()]
    owners = share_out(world.all_gather_object(mine))
    return {place[0]: state[place[0]] for place in mine if owners[place] == world.rank}


def share_out(held: Sequence[Sequence[Place]]) -> dict[Place, int]:
    """Return which rank stores each place, given what every rank holds.

    The holder with the fewest elements so far gets it. Every rank works this out for itself, so
    the answer depends on `held` alone, never on the order of a set.
    """
    holders: dict[Place, list[int]] = {}
    for rank, places in enumerate(held):  # once over all: with 256 ranks these are 10^5 places
        for place in places:
            holders.setdefault(place, []).append(rank)
    load = [0] * len(held)
    owners: dict[Place, int] = {}
    for place, ranks in holders.items():
        owners[place] = min(ranks, key=load.__getitem__)
        load[owners[place]] += place[2]
    return owners
