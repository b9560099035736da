"""What a checkpoint looks like on disk: names of no engine, pieces of no world size, no pickle.

    step_00000100/
        rank_00000.safetensors   the pieces that rank 0 stored, fp32, 1-D
        rank_00001.safetensors
        index.json               meta, which piece of which tensor lies where, a hash per block
        COMPLETE                 the hash of index.json; written last

A tensor's key is its kind and canonical name: `master/blocks.0.attn.qkv.weight`, `exp_avg/...`,
`exp_avg_sq/...`, `ema/...`, `objective/log_var`. A piece is a range of its flat elements.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file

from dtr_scale.errors import CheckpointError, ConfigError, DamagedCheckpointError
from dtr_scale.storage import Folder

FORMAT = 1
INDEX = "index.json"
COMPLETE = "COMPLETE"
BLOCK_BYTES = 16 * 2**20
_ITEM_BYTES = 4  # fp32 throughout


@dataclass(frozen=True)
class Piece:
    """Elements [offset, offset + n) of a flat tensor of `shape`; `data` is fp32 [n], often a view.

    Saving reads `data`, restoring writes to it in place.
    """

    shape: tuple[int, ...]
    offset: int
    data: torch.Tensor


def write_rank_file(path: Path, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Store one rank's pieces at `path`; return the file's entry for the index."""
    assert all(piece.data.dtype == torch.float32 for piece in pieces.values())
    tensors = {key: piece.data.detach().to("cpu").contiguous() for key, piece in pieces.items()}
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "blocks": list(_hash_blocks(path)),
        "pieces": {
            key: {
                "shape": pieces[key].shape,
                "offset": pieces[key].offset,
                "numel": pieces[key].data.numel(),
                "start_byte": start_byte,
            }
            for key, start_byte in _tensor_starts(path).items()
        },
    }


def build_index(entries: list[dict[str, Any]], meta: dict[str, Any]) -> bytes:
    """Return index.json for the ranks' file entries."""
    tensors: dict[str, Any] = {}
    for entry in entries:
        for key, piece in entry["pieces"].items():
            tensor = tensors.setdefault(key, {"shape": piece["shape"], "pieces": []})
            place = {k: piece[k] for k in ("offset", "numel", "start_byte")}
            tensor["pieces"].append({"file": entry["file"], **place})
    files = {e["file"]: {"bytes": e["bytes"], "blocks": e["blocks"]} for e in entries}
    index = {"format": FORMAT, "meta": meta, "files": files, "tensors": tensors}
    return json.dumps(index, indent=1).encode()


def complete_mark(index: bytes) -> bytes:
    return json.dumps({"index_xxh3": xxhash.xxh3_64_hexdigest(index)}).encode()


class CheckpointReader:
    """One complete checkpoint; every byte read is checked against the index.

    Raises DamagedCheckpointError naming the file when anything is missing, cut or altered, and
    CheckpointError when it cannot be read at all.
    """

    def __init__(self, folder: Folder) -> None:
        self.url = folder.url
        self._folder = folder
        self._block: tuple[str, int, bytes] | None = None
        self._sized: set[str] = set()
        index = self._read(INDEX)
        if self._read(COMPLETE) != complete_mark(index):
            raise DamagedCheckpointError(
                f"{self.url}: {INDEX} is not the one that {COMPLETE} names"
            )
        content = json.loads(index)
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{self.url} has format {content['format']}; this version reads {FORMAT}"
            )
        self.meta: dict[str, Any] = content["meta"]
        self._files: dict[str, Any] = content["files"]
        self._tensors: dict[str, Any] = content["tensors"]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key]["shape"])

    def read_whole(self, key: str) -> torch.Tensor:
        """Return a whole tensor, fp32, in its shape."""
        shape = self.shape(key)
        return self.read(key, 0, prod(shape)).view(shape)

    def read(self, key: str, offset: int, numel: int) -> torch.Tensor:
        """Return elements [offset, offset + numel) of a flat tensor, fp32 [numel]."""
        out = torch.empty(numel, dtype=torch.float32)
        found = 0
        for piece in self._tensors[key]["pieces"]:
            first = max(offset, piece["offset"])
            last = min(offset + numel, piece["offset"] + piece["numel"])
            if first < last:
                start = piece["start_byte"] + _ITEM_BYTES * (first - piece["offset"])
                data = self._read_verified(piece["file"], start, _ITEM_BYTES * (last - first))
                values = torch.frombuffer(bytearray(data), dtype=torch.float32)
                out[first - offset : last - offset] = values
                found += last - first
        if found != numel:
            raise DamagedCheckpointError(f"{self.url} holds {found} of {numel} elements of {key}")
        return out

    def read_into(self, wanted: Mapping[str, Piece]) -> dict[str, torch.Tensor]:
        """Return the values of the wanted pieces; the pieces themselves stay as they are.

        ConfigError if the checkpoint is of another network or objective.
        """
        for key, piece in wanted.items():
            stored = self.shape(key) if key in self._tensors else None
            if stored != piece.shape:
                raise ConfigError(
                    f"{self.url} is of another network or objective: {key} has shape {stored}, "
                    f"this run needs {piece.shape}; set model and objective as they were, or "
                    "choose another run_dir"
                )
        in_file_order = sorted(wanted, key=lambda key: self._place(key))
        return {
            key: self.read(key, wanted[key].offset, wanted[key].data.numel())
            for key in in_file_order
        }

    def _place(self, key: str) -> tuple[str, int]:
        first = self._tensors[key]["pieces"][0]
        return first["file"], first["start_byte"]

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Tell a file that is missing from one that cannot be read now."""
        try:
            yield
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{self.url}: {name} is missing") from None
        except OSError as error:
            raise CheckpointError(f"{self.url}: {name} cannot be read: {error}") from None

    def _read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        with self._reading(name):
            return self._folder.read_bytes(name, start, end)

    def _check_size_once(self, name: str) -> None:
        if name in self._sized:
            return
        with self._reading(name):
            found = self._folder.size(name)
        expected = self._files[name]["bytes"]
        if found != expected:
            raise DamagedCheckpointError(
                f"{self.url}: {name} has {found} bytes, its index {expected}"
            )
        self._sized.add(name)

    def _read_verified(self, name: str, start: int, length: int) -> bytes:
        first, last = start // BLOCK_BYTES, (start + length - 1) // BLOCK_BYTES
        data = b"".join(self._read_block(name, number) for number in range(first, last + 1))
        skip = start - first * BLOCK_BYTES
        return data[skip : skip + length]

    def _read_block(self, name: str, number: int) -> bytes:
        # Pieces are read in file order, so the last block is the one that is wanted again.
        if self._block and self._block[:2] == (name, number):
            return self._block[2]
        self._check_size_once(name)
        start = number * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, self._files[name]["bytes"])
        block = self._read(name, start, end)
        if xxhash.xxh3_64_hexdigest(block) != self._files[name]["blocks"][number]:
            raise DamagedCheckpointError(f"{self.url}: {name} is damaged in bytes {start} to {end}")
        self._block = (name, number, block)
        return block


def _hash_blocks(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield xxhash.xxh3_64_hexdigest(block)


def _tensor_starts(path: Path) -> dict[str, int]:
    """Return where each tensor's bytes start in a safetensors file: its header is JSON."""
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    return {key: 8 + header_bytes + entry["data_offsets"][0] for key, entry in header.items()}
