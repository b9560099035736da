"""Keep what was computed of pictures in the user's cache folder, by the hash of what it depends on.

A cache that cannot be used costs time alone: it is told, and everything is computed again.
"""

import hashlib
import json
import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dtr_scale.data.cache import GIB, default_cache_dir
from dtr_scale.data.seals import make_private
from dtr_scale.errors import DataError
from dtr_scale.storage.local import replacing

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

_FORMAT = 1  # to be raised with whatever changes what is computed
_MAX_BYTES = 16 * GIB  # 50,000 samples by Inception take 0.5 GB


def kept_arrays(depends_on: Any, compute: Callable[[], Arrays]) -> Arrays:  # noqa: ANN401
    """Return the arrays kept for what they depend on (JSON), or compute and keep them."""
    path = _path(depends_on)
    try:
        make_private(path.parent)
    except DataError:  # whose fix is a key of an experiment
        log.warning(
            "%s is no folder of this user's alone, so nothing is kept; set XDG_CACHE_HOME",
            path.parent,
        )
        return compute()
    try:
        with path.open("rb") as file, np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
        path.touch()  # the last to be removed
        return arrays
    except FileNotFoundError:
        pass
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged, and what it held computed again: %s", path, error)
    arrays = compute()
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
        _remove_oldest(path.parent)
    except OSError as error:
        log.warning("%s could not be kept: %s", path, error)
    return arrays


def is_kept(depends_on: Any) -> bool:  # noqa: ANN401
    """Tell whether `kept_arrays` would find what depends on this (JSON)."""
    return _path(depends_on).exists()


def _path(depends_on: Any) -> Path:  # noqa: ANN401
    key = json.dumps([_FORMAT, depends_on], sort_keys=True)
    return _folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def _folder() -> Path:
    return default_cache_dir().with_name("features")


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime)
    excess = sum(path.stat().st_size for path in files) - _MAX_BYTES
    for path in files[:-1]:
        if excess <= 0:
            return
        excess -= path.stat().st_size
        path.unlink(missing_ok=True)
