"""Keep account of finished shards in the folder that is being prepared.

`preparing.json` says what is being prepared, `<shard>.record.json` that a shard is stored with
its index. They let a killed run go on, and ranks work without talking: whoever stores the last
shard writes the manifest, which replaces them. A shard of the manifest that is cut or removed
later is made again by the next run, as are the tokens of the empty caption.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from dtr_scale.data.manifest import (
    MANIFEST_NAME,
    NULL_CONTEXT_NAME,
    Manifest,
    Sha256,
    Shard,
    data_errors,
    read_manifest,
    write_manifest,
)
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.storage.folder import Folder

PLAN_NAME = "preparing.json"


class ShardRecord(BaseModel):
    """A finished shard, and what it adds to the manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: Sha256
    shard: Shard
    unreadable: tuple[str, ...] = ()
    sums: tuple[float, ...] = ()
    """Of the stored numbers of each channel, without mirror images and deviations."""
    squares: tuple[float, ...] = ()
    """Sums of their squares."""

    @property
    def name(self) -> str:
        return record_name(self.shard.name)


def record_name(shard_name: str) -> str:
    """Return the name of a shard's record."""
    return f"{shard_name.removesuffix('.tar')}.record.json"


class Ledger:
    """The state of a folder against `plan`: the manifest to be, yet without shards."""

    def __init__(self, folder: Folder, plan: Manifest) -> None:
        self._folder = folder
        self._plan = plan
        content = json.dumps(_identity(plan), sort_keys=True)
        self._fingerprint = hashlib.sha256(content.encode()).hexdigest()
        # Of a manifest that was there before.
        self._listed: dict[str, Shard] = {}
        self._listed_null_context: Sha256 | None = None

    def begin(self) -> list[str]:
        """Note the plan and return the splits that lack shards: [] when all are there.

        Raises ConfigError when the folder holds, or is about to hold, other data.
        """
        with data_errors(self._folder, PLAN_NAME):
            names = self._folder.names()
        if PLAN_NAME in names:
            # Another rank may write the manifest, and remove the plan, at this very moment.
            with contextlib.suppress(FileNotFoundError):
                begun = Manifest.model_validate_json(self._folder.read_bytes(PLAN_NAME))
                self._must_be_alike(begun, "unfinished ", begun.origins | self._plan.origins)
        whole: set[str] = set()
        if MANIFEST_NAME in names:
            manifest = read_manifest(self._folder, split=None)
            listed = {shard.split for shard in manifest.shards}
            both = listed & self._plan.origins.keys()
            if unknown := sorted(both - manifest.origins.keys()):
                raise ConfigError(
                    f"{self._folder.url} holds data whose manifest does not say what "
                    f"{', '.join(unknown)} was made of, as an earlier version wrote it; fix: give "
                    "another --out, or remove the folder"
                )
            self._must_be_alike(manifest, "", both)
            self._listed = {shard.name: shard for shard in manifest.shards}
            self._listed_null_context = manifest.null_context_sha256
            whole = listed - {s.split for s in manifest.shards if not self._is_stored(s, names)}
        missing = [split for split in self._plan.origins if split not in whole]
        if not missing:
            self._clear(names)
        elif PLAN_NAME not in names:
            self._folder.write_bytes(PLAN_NAME, self._plan.model_dump_json(indent=1).encode())
        return missing

    def finished(self, shard_names: Iterable[str]) -> dict[str, ShardRecord]:
        """Return the records of those shards that are stored as the records or the manifest say."""
        names = set(self._folder.names())
        records: dict[str, ShardRecord] = {}
        for shard_name in shard_names:
            if (listed := self._listed.get(shard_name)) is not None:
                if self._is_stored(listed, names):
                    records[shard_name] = ShardRecord(fingerprint=self._fingerprint, shard=listed)
                continue
            if record_name(shard_name) not in names:
                continue
            try:
                content = self._folder.read_bytes(record_name(shard_name))
            except FileNotFoundError:  # another rank has just written the manifest
                continue
            record = ShardRecord.model_validate_json(content)
            # A record of other settings is of another shard, which is written over.
            if record.fingerprint == self._fingerprint and self._is_stored(record.shard, names):
                records[shard_name] = record
        return records

    def _is_stored(self, shard: Shard, names: Collection[str]) -> bool:
        """Tell whether a shard of its size and an index are there; no byte is read."""
        there = shard.name in names and shard.index_name in names
        return there and self._folder.size(shard.name) == shard.bytes

    def add(
        self,
        shard: Shard,
        unreadable: Sequence[str],
        sums: Sequence[float],
        squares: Sequence[float],
    ) -> None:
        """Note a shard that is stored with its index.

        Raises DataError, and removes it, if the manifest lists it with other bytes.
        """
        if (listed := self._listed.get(shard.name)) is not None:
            if shard != listed:
                self._folder.remove(shard.name)
                raise DataError(
                    f"{self._folder.url}/{shard.name} was lost, and made again it is not what "
                    "the manifest says; fix: give the pictures and the --batch-size it was made "
                    "with, or another --out"
                )
            return
        record = ShardRecord(
            fingerprint=self._fingerprint,
            shard=shard,
            unreadable=tuple(unreadable),
            sums=tuple(sums),
            squares=tuple(squares),
        )
        self._folder.write_bytes(record.name, record.model_dump_json().encode())

    def add_null_context(self, content: bytes) -> None:
        """Store the tokens of the empty caption; DataError if the manifest says others."""
        if self._listed_null_context not in (None, hashlib.sha256(content).hexdigest()):
            raise DataError(
                f"{self._folder.url}/{NULL_CONTEXT_NAME} was lost, and made again it is not what "
                "the manifest says; fix: give the text encoder it was made with, or another --out"
            )
        self._folder.write_bytes(NULL_CONTEXT_NAME, content)

    def forget(self, record: ShardRecord) -> None:
        """Let a stored shard be made again, by whichever rank makes it."""
        self._folder.remove(record.name)

    def finish(self, records: Sequence[ShardRecord]) -> Manifest:
        """Write the manifest of all shards, beside those of splits that were there before."""
        records = [record for record in records if record.shard.name not in self._listed]
        written = {record.shard.split for record in records}
        # A split that was prepared earlier stays in the manifest.
        before = self._plan
        if self._folder.exists(MANIFEST_NAME):
            before = read_manifest(self._folder, split=None)
        shards = [shard for shard in before.shards if shard.split not in written]
        unreadable = [name for name in before.unreadable if name.partition("/")[0] not in written]
        content = {
            "shards": (*shards, *(record.shard for record in records)),
            "unreadable": (*unreadable, *(name for r in records for name in r.unreadable)),
            "origins": before.origins | self._plan.origins,
            "channel_mean": before.channel_mean,
            "channel_std": before.channel_std,
        }
        # The manifest's statistics are those of training, whatever split joins later.
        if "train" in written:
            content["channel_mean"], content["channel_std"] = self._statistics(
                [record for record in records if record.shard.split == "train"]
            )
        if self._plan.context_shape is not None:
            tokens = self._folder.read_bytes(NULL_CONTEXT_NAME)
            content["null_context_sha256"] = hashlib.sha256(tokens).hexdigest()
        manifest = self._plan.model_copy(update=content)
        # Before the records go: a kill in between leaves both, and the next `begin` clears up.
        write_manifest(self._folder, manifest)
        self._clear(self._folder.names())
        return manifest

    def _statistics(
        self, records: Sequence[ShardRecord]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of x_start, by channel."""
        channels, height, width = self._plan.shape
        count = max(1, sum(record.shard.samples for record in records)) * height * width
        scale, shift = self._plan.scale_factor, self._plan.shift
        mean, std = [], []
        for channel in range(channels):
            # fsum rounds once: every rank gets the same figure, in whatever order shards were made.
            stored = math.fsum(record.sums[channel] for record in records) / count
            square = math.fsum(record.squares[channel] for record in records) / count
            mean.append(stored * scale + shift)
            # Rounding may bring the variance of a constant channel below 0.
            std.append(math.sqrt(max(0.0, square - stored**2)) * scale)
        return tuple(mean), tuple(std)

    def _clear(self, names: Sequence[str]) -> None:
        """Remove what the manifest replaces, the plan last, and what a killed process left."""
        if self._folder.is_local:
            for split in self._plan.origins:
                for left in self._folder.local_path.glob(f".{split}-*.part"):
                    left.unlink(missing_ok=True)
        for name in (*(name for name in names if name.endswith(".record.json")), PLAN_NAME):
            if name in names:
                self._folder.remove(name)

    def _must_be_alike(self, found: Manifest, state: str, splits: Iterable[str]) -> None:
        told = differences(_identity(found), _identity(self._plan), splits)
        if told:
            raise ConfigError(
                f"{self._folder.url} holds {state}data of other settings: {'; '.join(told)}; fix: "
                "give these settings, another --out, or remove the folder"
            )


def differences(found: dict[str, Any], wanted: dict[str, Any], splits: Iterable[str]) -> list[str]:
    """Return what differs between the identities of two manifests, a line per setting."""
    origins = {split: found["origins"].get(split, {}) for split in splits}
    wanted_origins = {split: wanted["origins"].get(split, {}) for split in origins}
    pairs = _flat(found | {"origins": origins}), _flat(wanted | {"origins": wanted_origins})
    return [
        f"{name} is {_short(pairs[0].get(name))}, not {_short(pairs[1].get(name))}"
        for name in sorted(pairs[0].keys() | pairs[1].keys())
        if pairs[0].get(name) != pairs[1].get(name)
    ]


def _identity(plan: Manifest) -> dict[str, Any]:
    """Return what two plans must have in common to be of the same data."""
    told = {"shards", "unreadable", "channel_mean", "channel_std", "null_context_sha256"}
    names: dict[str, Any] = {"encoder": {"name"}, "text_encoder": {"name"}}  # a folder may move
    return plan.model_dump(mode="json", exclude=names | dict.fromkeys(told, True))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves |= _flat(value, f"{prefix}{name}.")
        else:
            leaves[prefix + name] = value
    return leaves


def _short(value: object) -> str:
    text = "absent" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
