"""Looking into checkpoints: what is in one, is it whole, how do two differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from dtr_scale.checkpoint.catalog import Catalog
from dtr_scale.checkpoint.layout import INDEX, ITEM_BYTES
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.errors import CheckpointError, ConfigError, DamagedCheckpointError
from dtr_scale.storage.folder import Folder, open_folder

_POSITION = ("step", "samples_seen", "optimizer_step", "world_size", "version", "torch")


def find_checkpoint(place: str) -> CheckpointReader:
    """Return the checkpoint at a local path or s3:// URL: one itself, or a run's newest complete.

    Raises ConfigError where there is none, CheckpointError where none is complete.
    """
    folder = open_folder(place)
    if folder.exists(INDEX):
        return CheckpointReader(folder)
    return next(complete_checkpoints(place))


def complete_checkpoints(place: str) -> Iterator[CheckpointReader]:
    """Yield the complete checkpoints of a run directory or checkpoint.dir, newest first.

    Raises ConfigError where there are none, CheckpointError where none is complete.
    """
    catalogs = [Catalog(folder) for folder in _folders(open_folder(place))]
    places = [(catalog, step) for catalog in catalogs for step in catalog.steps()]
    if not places:
        raise ConfigError(
            f"{place!r} holds no checkpoint; give a step_* folder, or the run directory above it"
        )
    complete = [catalog.reader(step) for catalog, step in places if catalog.is_complete(step)]
    if not complete:
        raise CheckpointError(f"none of the {len(places)} checkpoints in {place} is complete")
    yield from complete


def _folders(place: Folder) -> Iterator[Folder]:
    """Yield where the checkpoints of a run directory or checkpoint.dir may be."""
    yield place
    yield place.child("checkpoints")
    if place.exists("config.json"):
        config = place.read_json("config.json")
        if elsewhere := config["checkpoint"]["dir"]:
            yield open_folder(elsewhere, config["data"]["storage_options"])


def describe(reader: CheckpointReader) -> str:
    """Return where a checkpoint stands, what kinds of tensors it holds and its tree, as text."""
    lines = [reader.url, *(f"{key:<15} {reader.meta.get(key)}" for key in _POSITION)]
    if probe := reader.meta.get("probe"):
        lines.append(f"{'probe loss':<15} {probe['loss']:.8g}")
    kinds: dict[str, list[int]] = {}
    for key, shape in reader.shapes.items():
        count = kinds.setdefault(key.partition("/")[0], [0, 0])
        count[0] += 1
        count[1] += prod(shape)
    lines.append("\nkind             tensors    elements          size")
    lines += [
        f"{kind:<16} {tensors:>7} {elements:>11,} {_size(elements * ITEM_BYTES):>13}"
        for kind, (tensors, elements) in kinds.items()
    ]
    lines.append("\nfiles")
    lines += [f"{name:<28} {_size(size):>13}" for name, size in reader.file_sizes.items()]
    lines.append("\nparameters")
    lines += _tree(
        {
            key.partition("/")[2]: shape
            for key, shape in reader.shapes.items()
            if key.startswith("master/")
        }
    )
    return "\n".join(lines)


def verify(reader: CheckpointReader) -> Iterator[tuple[str, str | None]]:
    """Read every byte; yield each file's name and what is wrong with it, None if nothing is."""
    for name in reader.file_sizes:
        try:
            reader.check_file(name)
            yield name, None
        except DamagedCheckpointError as error:
            yield name, str(error)


@dataclass(frozen=True)
class KindDifference:
    """How far the tensors of one kind are apart."""

    kind: str
    differing: int
    total: int
    largest: float
    largest_in: str
    relative: float
    """Norm of the difference over the norm of the first."""


def differences(a: CheckpointReader, b: CheckpointReader) -> tuple[list[str], list[KindDifference]]:
    """Return what differs between two checkpoints, configs aside: as text, and tensors by kind."""
    told = _unequal(a.meta | {"config": None}, b.meta | {"config": None})
    for one, other in ((a, b), (b, a)):
        told += [
            f"{key} {list(shape)} is in {one.url} alone"
            for key, shape in one.shapes.items()
            if other.shapes.get(key) != shape
        ]
    common = [key for key, shape in a.shapes.items() if b.shapes.get(key) == shape]
    kinds = dict.fromkeys(key.partition("/")[0] for key in common)
    return told, [
        _kind_difference(a, b, kind, [key for key in common if key.partition("/")[0] == kind])
        for kind in kinds
    ]


def _kind_difference(
    a: CheckpointReader, b: CheckpointReader, kind: str, keys: list[str]
) -> KindDifference:
    differing, largest, largest_in, squares, own = 0, 0.0, "", 0.0, 0.0
    for key in keys:
        first, second = a.read([key])[key].double(), b.read([key])[key].double()
        apart = (first - second).abs()
        furthest = float(apart.max()) if apart.numel() else 0.0
        differing += furthest > 0
        if furthest > largest:
            largest, largest_in = furthest, key
        squares += float(apart.square().sum())
        own += float(first.square().sum())
    relative = (squares / own) ** 0.5 if own else squares**0.5
    return KindDifference(kind, differing, len(keys), largest, largest_in, relative)


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {a.get(key)!r} and {b.get(key)!r}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    ]


def _tree(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return an indented tree of dotted names; blocks that are alike are one branch."""
    blocks: dict[str, set[str]] = {}
    merged: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdecimal() and i == 1), None)
        if number is not None:
            blocks.setdefault(parts[0], set()).add(parts[1])
            parts[1] = "*"
        merged.setdefault(".".join(parts), shape)
    lines, shown = [], set()
    for name, shape in merged.items():
        parts = name.split(".")
        top = parts[0]
        if top not in shown:
            shown.add(top)
            times = f" x {len(blocks[top])}" if top in blocks else ""
            total = sum(prod(s) for n, s in shapes.items() if n.split(".")[0] == top)
            lines.append(f"  {top}{times}  {total:,}")
        rest = ".".join(parts[2:] if parts[1:2] == ["*"] else parts[1:])
        lines.append(f"    {rest:<32} {list(shape)}")
    return lines


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.2f} MiB"
