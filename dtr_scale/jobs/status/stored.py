"""Tell how a run stands by what is stored of it: its config and its checkpoints."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtr_scale.checkpoint.layout import COMPLETE, INDEX, published_steps, step_name
from dtr_scale.checkpoint.lease import read_holder
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.status.state import FINISHED, UNKNOWN, RunStatus, Saved, judge
from dtr_scale.storage.folder import Folder, open_folder
from dtr_scale.tracking.attempts import ATTEMPTS
from dtr_scale.train.run_dir import CHECKPOINTS, JOURNAL, OWNER, STATUS


class StoredConfig:
    """What a stored config tells, if there is one; it may be of any version."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self.name = str(content.get("name", ""))
        self.max_steps = self._number("train", "max_steps")
        self.log_every = self._number("train", "log_every") or 1
        self.save_every = self._number("checkpoint", "every_steps")

    def checkpoints(self, run_dir: Path) -> Folder:
        elsewhere = self._section("checkpoint").get("dir")
        if not elsewhere:
            return open_folder(run_dir / CHECKPOINTS)
        # Soon told: who looks does not wait for a server as training does.
        options = self._section("data").get("storage_options") or {}
        return open_folder(elsewhere, options | ({"max_attempts": 2} if "://" in elsewhere else {}))

    def _section(self, name: str) -> Mapping[str, Any]:
        section = self._content.get(name)
        return section if isinstance(section, Mapping) else {}

    def _number(self, section: str, key: str) -> int | None:
        value = self._section(section).get(key)
        return value if isinstance(value, int) else None


def read_checkpoint_dir(folder: Folder) -> RunStatus:
    """Return how a run stands by the folder of its checkpoints; its directory may be anywhere.

    ConfigError if it is none, or cannot be read.
    """
    problems: list[str] = []
    try:
        holder, steps = read_holder(folder, OWNER), published_steps(folder)
        if not steps and not folder.exists(OWNER):
            raise ConfigError(
                f"{folder.url} is no run: it has none of {STATUS}, {JOURNAL}, {ATTEMPTS}, no "
                "checkpoint, and no folder in it is a run; give what `dtr-scale train` wrote as "
                "run_dir, a folder of such, or a checkpoint.dir"
            )
        meta = _meta(folder.child(step_name(steps[0]))) if steps else {}
    except OSError as error:
        raise ConfigError(
            f"{folder.url} cannot be read: {error}; for s3:// check AWS_ENDPOINT_URL, "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, the server"
        ) from None
    config = StoredConfig(meta.get("config", {}))
    saved = newest_saved(folder, steps[0] if steps else None, problems)
    step = saved.step if saved else 0
    # Whoever leaves gives the lease back: a run without one is at rest, for whatever reason.
    state, reason = judge({"outcome": "running"}, holder, has_logged=bool(steps))
    if holder is None:
        is_whole = config.max_steps is not None and step >= config.max_steps
        state, reason = (FINISHED, "") if is_whole else (UNKNOWN, "no job holds it")
    return RunStatus(
        name=config.name or folder.url,
        place=folder.url,
        state=state,
        reason=reason,
        holder=holder,
        step=step,
        max_steps=config.max_steps,
        saved=saved,
        problems=problems,
    )


def newest_saved(folder: Folder, known: int | None, problems: list[str]) -> Saved | None:
    """Return the newest checkpoint; `known` is what the run has told of it."""
    try:
        steps = published_steps(folder)
        if known is not None and known not in steps:
            problems.append(f"the checkpoint of step {known} is gone from {folder.url}")
        if steps:
            written = folder.modified(f"{step_name(steps[0])}/{COMPLETE}")
            url = folder.child(step_name(steps[0])).url
            return Saved(steps[0], url, max(0.0, time.time() - written))
    except OSError as error:  # also a checkpoint that was removed at this moment
        problems.append(f"the checkpoints cannot be looked at: {error}")
        return Saved(known, folder.url, None) if known is not None else None
    return None


def _meta(checkpoint: Folder) -> dict[str, Any]:
    with contextlib.suppress(ValueError, KeyError, TypeError, FileNotFoundError):
        return dict(json.loads(checkpoint.read_bytes(INDEX))["meta"])
    return {}
