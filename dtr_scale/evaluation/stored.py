"""Keep finished batches of samples in a folder, so that a job that is killed loses only a part.

Any number of ranks fill it, on one file system. A batch appears whole or not at all.
"""

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dtr_scale.errors import ConfigError, EvaluationError
from dtr_scale.evaluation.pictures import Pictures
from dtr_scale.storage.local import LocalFolder

log = logging.getLogger(__name__)

_MANIFEST, _ARRAY = "manifest.json", "samples"
TOLD_ALONE = ("checkpoints", "device")
"""Keys of a manifest that may differ: a run that was moved has the same weights."""


class StoredBatches:
    """Samples 0 to `num_samples`, of which batch k holds those from k `batch_size` on.

    Arrays are [n, ...]. `path` need not exist.
    """

    def __init__(self, path: Path, num_samples: int, batch_size: int) -> None:
        self.path = path
        self.num_samples = num_samples
        self.batch_size = batch_size
        self._folder = LocalFolder(str(path))
        self._lock: int | None = None

    @property
    def num_batches(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def members(self, batch: int) -> range:
        """Return the samples to draw for a batch, as many for the last one as for the others.

        A matrix product's rounding depends on its rows: of another size, it would be other samples.
        """
        return range(batch * self.batch_size, (batch + 1) * self.batch_size)

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Hold the folder, and go on with what is in it; one process does so for all ranks.

        ConfigError if another job holds it, or if its samples are of another manifest.
        """
        # As it comes back from the file, where a tuple is a list.
        wanted = json.loads(json.dumps(manifest))
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        if differences := self._differences(wanted):
            self._let_go()
            raise ConfigError(
                f"{self.path} holds unfinished samples of other settings: {differences}; give the "
                "same settings to go on with them, choose another place, or remove that folder"
            )
        self._folder.write_bytes(_MANIFEST, json.dumps(wanted, indent=2).encode() + b"\n")

    def forget_others(self, manifest: Mapping[str, Any]) -> None:
        """Remove unfinished samples of another manifest, which nobody gave a name."""
        if differences := self._differences(json.loads(json.dumps(manifest))):
            log.info("unfinished samples of other settings are dropped: %s", differences)
            self._hold()
            self.remove()
            self._let_go()

    def unfinished_manifest(self) -> dict[str, Any] | None:
        """Return the manifest of what an earlier job has left here, None if there is none."""
        try:
            return self._folder.read_json(_MANIFEST)
        except (OSError, ValueError):
            return None

    def missing(self) -> list[int]:
        """Return the batches that are not stored; those that were cut or damaged count as such."""
        return [batch for batch in range(self.num_batches) if not self._is_whole(batch)]

    def write(self, batch: int, samples: np.ndarray) -> None:
        """Store a batch, of which no more is kept than was asked for.

        EvaluationError if it cannot be.
        """
        count = min(self.batch_size, self.num_samples - batch * self.batch_size)
        content = io.BytesIO()
        np.savez(content, **{_ARRAY: samples[:count]})  # pyright: ignore[reportArgumentType]
        try:
            self._folder.write_bytes(_name(batch), content.getbuffer())
        except OSError as error:
            told = EvaluationError(
                f"samples cannot be stored in {self.path}: {error.strerror}; make room and give "
                "the same command, which goes on with what is stored"
            )
            told.exit_code = 1
            raise told from None

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield all batches in their order; a damaged one is removed, and an EvaluationError."""
        for batch in range(self.num_batches):
            path = self.path / _name(batch)
            try:
                with np.load(path) as stored:
                    yield stored[_ARRAY]  # checked by the sum that zip keeps
            except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                path.unlink(missing_ok=True)
                told = EvaluationError(
                    f"{path} is damaged and was removed ({error}); give the same command, which "
                    "draws it again. Where several nodes draw, the folder must be one for all"
                )
                told.exit_code = 1
                raise told from None

    def first(self, count: int) -> np.ndarray:
        """Return the first `count` samples, or all where there are fewer."""
        found: list[np.ndarray] = []
        for batch in self:
            found.append(batch)
            if len(found) * self.batch_size >= count:
                break
        return np.concatenate(found)[:count]

    def pieces(self, size: int) -> Iterator[np.ndarray]:
        """Yield all samples in their order, `size` at a time."""
        held: list[np.ndarray] = []
        for batch in self:
            joined = np.concatenate([*held, batch])
            whole = len(joined) // size * size
            for start in range(0, whole, size):
                yield joined[start : start + size]
            held = [joined[whole:]]
        if held and len(held[0]):
            yield held[0]

    def remove(self) -> None:
        """Remove everything."""
        self._folder.remove("")

    def close(self) -> None:
        """Let go of the folder, which goes if nothing was stored."""
        if self._lock is None:
            return
        if len(self.missing()) == self.num_batches:
            self.remove()
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _hold(self) -> None:
        # The kernel lets go of it when the process ends, however that happens.
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                self._let_go()
                raise ConfigError(
                    f"another job draws samples into {self.path}; wait for it, or choose another "
                    "place"
                ) from None
            # Some network file systems know no locks: two jobs would write the same bytes.

    def _differences(self, wanted: dict[str, Any]) -> str:
        stored = self.unfinished_manifest()
        return "" if stored is None else differences(stored, wanted)

    def _is_whole(self, batch: int) -> bool:
        # The directory is a zip's last part: in a file that was cut it is missing.
        return zipfile.is_zipfile(self.path / _name(batch))


class StoredPictures(Pictures):
    """Pictures of a run that were stored as batches, uint8 [n, H, W, C]."""

    def __init__(self, stored: StoredBatches, source: str) -> None:
        self.source = source
        self._stored = stored
        height, width, channels = next(iter(stored)).shape[1:]
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return self._stored.num_samples

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        for piece in self._stored.pieces(batch_size):
            yield piece.transpose(0, 3, 1, 2)

    def _hash(self) -> str:
        digest = hashlib.sha256(f"{len(self)} {self.shape}".encode())
        for batch in self._stored:
            digest.update(np.ascontiguousarray(batch).data)
        return digest.hexdigest()


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Return how the samples of two manifests differ, "" if they are the same."""
    keys = [key for key in {**stored, **wanted} if key not in TOLD_ALONE]
    return ", ".join(
        f"{key} was {_short(stored.get(key))} and is {_short(wanted.get(key))}"
        for key in keys
        if stored.get(key) != wanted.get(key)
    )


def _name(batch: int) -> str:
    return f"batch_{batch:06d}.npz"


def _short(value: Any) -> str:  # noqa: ANN401
    """Return a value as a message shows it: of a hash the beginning."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}..."
