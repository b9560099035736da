"""Lay a checkpoint out on disk: names of no engine, pieces of no world size, no pickle.

    step_00000100/
        rank_00000.safetensors   the pieces that rank 0 stored, fp32, 1-D
        rank_00001.safetensors
        index.json               meta, which piece of which tensor lies where, a hash per block
        COMPLETE                 the hash of index.json; written last

A tensor's key is its kind and canonical name: `master/blocks.0.attn.qkv.weight`, `exp_avg/...`,
`exp_avg_sq/...`, `ema/...`, `buffer/...`, `objective/log_var`. A piece is a range of its flat
elements.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import xxhash

from dtr_scale.storage.folder import Folder

FORMAT = 1
INDEX = "index.json"
COMPLETE = "COMPLETE"
# A hash is of a whole block, so a block is the least that a reader reads. Part of the format: with
# another size, what is stored would look damaged.
BLOCK_BYTES = 16 * 2**20
ITEM_BYTES = 4  # fp32 throughout

_STEP_NAME = re.compile(r"step_(\d{8,})")
_RANK_FILE = re.compile(r"rank_\d{5,}\.safetensors")


def kind_of(key: str) -> str:
    """Return the kind of a tensor by its key: "ema" of "ema/blocks.0.attn.qkv.weight"."""
    return key.partition("/")[0]


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def published_steps(folder: Folder) -> list[int]:
    """Return the steps that have a checkpoint, newest first; saves cut off do not count."""
    matches = [match for name in folder.names() if (match := _STEP_NAME.fullmatch(name))]
    steps = sorted((int(match[1]) for match in matches), reverse=True)
    return [step for step in steps if folder.is_published(step_name(step), COMPLETE)]


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def is_rank_file(name: str) -> bool:
    """Tell whether a name in an index is that of a checkpoint's own file, not a way elsewhere."""
    return _RANK_FILE.fullmatch(name) is not None


def build_header(numels: Mapping[str, int]) -> tuple[bytes, dict[str, int]]:
    """Return the start of a safetensors file of 1-D fp32 tensors, and where each one's bytes start.

    It is the length of a JSON object in 8 bytes, then that object, padded so that tensors are
    aligned; their bytes follow without gaps.
    """
    entries: dict[str, Any] = {}
    end = 0
    for key, numel in numels.items():
        start, end = end, end + ITEM_BYTES * numel
        entries[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    # safetensors takes spaces after the object.
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + entries[key]["data_offsets"][0] for key in entries}


def build_index(entries: list[dict[str, Any]], meta: dict[str, Any]) -> bytes:
    """Return index.json for the ranks' file entries."""
    tensors: dict[str, Any] = {}
    for entry in entries:
        for key, piece in entry["pieces"].items():
            tensor = tensors.setdefault(key, {"shape": piece["shape"], "pieces": []})
            place = {k: piece[k] for k in ("offset", "numel", "start_byte")}
            tensor["pieces"].append({"file": entry["file"], **place})
    index = {
        "format": FORMAT,
        "meta": meta,
        "files": {e["file"]: {"bytes": e["bytes"], "blocks": e["blocks"]} for e in entries},
        "tensors": tensors,
    }
    # Compact: Python itself would indent, 5 s for the 900,000 pieces of DiT-XL/2 under FSDP2 on
    # 1,024 ranks, and the index would be half as large again.
    return json.dumps(index, separators=(",", ":")).encode()


def complete_mark(index: bytes) -> bytes:
    return json.dumps({"index_xxh3": xxhash.xxh3_64_hexdigest(index)}).encode()
