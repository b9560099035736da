"""Find a run's checkpoints, describe one, check its bytes, and compare two."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeVar

from dtr_scale.checkpoint.best import BestTag
from dtr_scale.checkpoint.catalog import Catalog
from dtr_scale.checkpoint.layout import COMPLETE, INDEX, ITEM_BYTES
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.errors import CheckpointError, ConfigError, DamagedCheckpointError
from dtr_scale.storage.folder import Folder, open_folder

log = logging.getLogger(__name__)

_Read = TypeVar("_Read")
_POSITION = ("step", "samples_seen", "optimizer_step", "world_size", "version", "torch")


def find_checkpoint(
    place: str, step: int | None = None, storage_options: Mapping[str, Any] | None = None
) -> CheckpointReader:
    """Return a checkpoint whose files are there in full: see `read_newest`."""

    def checked(reader: CheckpointReader) -> CheckpointReader:
        reader.check_sizes()
        return reader

    return read_newest(place, checked, step, storage_options)


def read_newest(
    place: str,
    read: Callable[[CheckpointReader], _Read],
    step: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> _Read:
    """Return what `read` makes of a checkpoint at a local path or s3:// URL.

    That is the place itself, or a run's newest: a damaged one is named and the one before it taken,
    as in training. With `step` it is the one of that step or none. `storage_options` are those of
    `find_checkpoints`. Raises ConfigError where there is none, CheckpointError where none is whole.
    """
    found = find_checkpoints(place, storage_options)
    if step is not None:
        found = [checkpoint for checkpoint in found if checkpoint.step in (step, None)]
    for checkpoint in found:
        try:
            reader = checkpoint.open()
            # A checkpoint given by its own path tells its step in its meta alone.
            if step in (None, reader.meta["step"]):
                return read(reader)
        except DamagedCheckpointError as error:
            if step is not None or checkpoint.step is None:
                raise
            log.warning("checkpoint passed over: %s", error)
    if step is not None:
        raise ConfigError(f"--step={step}: {place} has no checkpoint of that step")
    raise CheckpointError(f"none of the {len(found)} checkpoints in {place} is complete")


class StoredCheckpoint(NamedTuple):
    """A checkpoint that should be whole."""

    folder: Folder
    step: int | None
    """None for one that was given by its own path."""

    def open(self) -> CheckpointReader:
        """Return its reader; DamagedCheckpointError if mark and index do not fit."""
        return CheckpointReader(self.folder)


def find_checkpoints(
    place: str, storage_options: Mapping[str, Any] | None = None
) -> list[StoredCheckpoint]:
    """Return the checkpoint at a place itself, or all of a run or checkpoint.dir, newest first.

    Saves that were cut off do not count. `storage_options` stand for those of the run's config,
    which keeps no secrets. Raises ConfigError where there are none, CheckpointError for a place
    that cannot be read.
    """
    folder = open_folder(place)
    try:
        if folder.exists(INDEX) or folder.exists(COMPLETE):
            return [StoredCheckpoint(folder, None)]
        catalog = Catalog(_checkpoints_of(folder, storage_options))
        found = [StoredCheckpoint(catalog.at(step), step) for step in catalog.steps()]
    except OSError as error:
        raise CheckpointError(
            f"{place} cannot be read: {error}; give a step_* folder, or the run above it; "
            "for s3:// check AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, the server"
        ) from None
    if not found:
        raise ConfigError(
            f"{place!r} holds no checkpoint; give a step_* folder, or the run directory above it"
        )
    return found


def _checkpoints_of(place: Folder, storage_options: Mapping[str, Any] | None) -> Folder:
    """Return the folder of a run's checkpoints; any other place is one itself or above it."""
    if place.exists("config.json"):
        config = place.read_json("config.json")
        if elsewhere := config["checkpoint"]["dir"]:
            # The config keeps no secrets: keys come from the caller or from the environment.
            stored = config["data"]["storage_options"]
            return open_folder(elsewhere, stored if storage_options is None else storage_options)
    inside = place.child("checkpoints")
    return inside if inside.names() else place


def listing(place: str) -> Iterator[str]:
    """Yield a line for each checkpoint of a place, newest first: step, size, and what it is."""
    found = find_checkpoints(place)
    yield f"{'step':>10} {'size':>12}  what it is"
    for checkpoint in found:
        try:
            reader = checkpoint.open()
            reader.check_sizes()
        except DamagedCheckpointError as error:
            yield f"{checkpoint.step or '?':>10} {'':>12}  damaged: {error}"
            continue
        size = _size(sum(reader.file_sizes.values()))
        tag = _tag(reader)
        yield f"{reader.meta['step']:>10} {size:>12}  {tag or 'complete'}"


def _tag(reader: CheckpointReader) -> str | None:
    """Return in words that a checkpoint is the best of its run, None if it is not."""
    try:
        best = BestTag(open_folder(reader.url.rstrip("/").rpartition("/")[0])).best()
    except OSError:  # the checkpoint itself could be read, and is what was asked for
        return None
    if best is None or best.step != reader.meta["step"]:
        return None
    return f"best, {best.metric} {best.value:.6g}"


def describe(reader: CheckpointReader) -> str:
    """Return where a checkpoint stands, what kinds of tensors it holds and its tree, as text."""
    lines = [reader.url, *(f"{key:<15} {reader.meta.get(key)}" for key in _POSITION)]
    if probe := reader.meta.get("probe"):
        lines.append(f"{'probe loss':<15} {probe['loss']:.8g}")
    if tag := _tag(reader):
        lines.append(f"{'tag':<15} {tag}")
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
    """The distance between two checkpoints' tensors of one kind."""

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
        # A tensor at a time: two checkpoints may not fit into memory.
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
