"""Hold a folder for one run, and for one job of it at a time.

A file in the folder names the run that owns it for good, and the job that holds it now. The job
renews the file every few seconds from a thread; one that is not renewed any more may be taken over.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dtr_scale.errors import ConfigError
from dtr_scale.storage.folder import Folder

log = logging.getLogger(__name__)

LEASE_SECONDS = 15.0
"""A lease that stays as it is for so long has run out; measured by who waits, clocks differ."""
# Two renewals may fail or come late before the lease has run out.
_RENEW_SECONDS = 5.0
# Longer than a lease: one that nobody renews is taken over, not waited for in vain.
_PATIENCE_SECONDS = 20.0
"""For a holder that is alive: it may be about to leave."""
# Longer than from a read to the write that follows it.
_SETTLE_SECONDS, _LOCAL_SETTLE_SECONDS = 1.0, 0.1

_held: set[str] = set()
"""The leases of this process, whose pid tells nothing about one that could not be given back."""


class Lease:
    """One job's hold on a folder, from `take` to `release`; rank 0 of the job makes one of these.

    `key` and `folder` say in messages what is held. `lost` is called from the thread, with a
    message, once another job has taken the folder over: this one must not write there any more.
    """

    def __init__(
        self,
        folder: Folder,
        name: str,
        *,
        key: str,
        run_dir: Path,
        lost: Callable[[str], None],
    ) -> None:
        self.run = ""
        """The run that owns the folder, once it is taken."""
        self.created = False
        """Whether nobody owned it before."""
        self.begun_by: str | None = None
        """Name of the launch that began the run in this folder afresh on purpose, if one has."""
        self._folder = folder
        self._name = name
        self._key = key
        self._run_dir = str(run_dir.absolute())
        self._lost = lost
        self.job = secrets.token_hex(8)
        """Of all leases, this one."""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._renew_until_closing, daemon=True)

    def take(self, run: str | None = None, *, is_new_run: bool = True) -> None:
        """Take the folder for `run`, by default for the one that owns it, or a new one.

        A holder that is gone, or whose lease runs out, is taken over; ConfigError if it is alive,
        or if the folder is another run's. A new run takes over what a run of the same directory
        owns: where that is on a node's own disk, it is new on each node.
        """
        _held.add(self.job)  # before it is written, which others of this process may read
        try:
            self._wait_until_free(run, is_new_run=is_new_run)
        except BaseException:
            _held.discard(self.job)
            raise
        self._thread.start()

    def tell_begun(self, launch: str) -> None:
        """Keep with the folder which launch has begun the run in it."""
        self.begun_by = launch
        with contextlib.suppress(OSError):  # the next renewal writes it
            self._folder.write_bytes(self._name, self._content())

    def release(self, *, forget: bool = False) -> None:
        """Give the folder back to its run; `forget` leaves no trace where nobody owned it before.

        Nothing happens after it was lost, or if storage is away: the lease runs out by itself.
        """
        if not self._thread.is_alive():
            return
        self._closing.set()
        # A renewal after the release would hold the folder for a job that is gone.
        self._thread.join()
        _held.discard(self.job)
        with contextlib.suppress(OSError, ValueError):
            if (self._read() or {}).get("job") != self.job:
                return
            if forget and self.created:
                self._folder.remove(self._name)
            else:
                self._folder.write_bytes(self._name, self._content(held=False))

    def _wait_until_free(self, run: str | None, *, is_new_run: bool) -> None:
        start = seen = time.monotonic()
        before: dict[str, Any] | None = None
        told = False
        while True:
            found = self._read()
            if found is None:
                self.run = run or secrets.token_hex(8)
                # Decided by the folder: of two jobs that start at once, one creates the file.
                self.created = self._folder.create(self._name, self._content())
                if self.created:
                    return
                continue
            if found.get("job") == self.job:
                return  # taken over, or created and the answer was lost on its way
            self._refuse_other_run(found, run, is_new_run=is_new_run)
            now = time.monotonic()
            # Any change shows life: each renewal has another time.
            if found != before:
                before, seen = found, now
            alive = _is_alive(found) if found.get("run_dir") == self._run_dir else None
            run_out = alive is None and now - seen >= LEASE_SECONDS
            if "job" not in found or alive is False or run_out:
                self.run = found.get("run") or run or secrets.token_hex(8)
                self.begun_by = found.get("begun_by")
                self._folder.write_bytes(self._name, self._content())
                # Another may have read the same and write a moment later: the last to write has
                # the folder, as the next round tells both.
                time.sleep(_LOCAL_SETTLE_SECONDS if self._folder.is_local else _SETTLE_SECONDS)
                continue
            # Where its process cannot be seen, a renewal since this wait began is the proof.
            if now - start > _PATIENCE_SECONDS and (alive or seen > start + 1):
                raise ConfigError(
                    f"{self._key} = {self._folder.url!r} is in use by {_holder(found)}; wait for "
                    f"that job, stop it, or choose another with --{self._key}=PATH"
                )
            if not told and now - start > 1:
                told = True
                log.info(
                    "%s is held by %s; waiting up to %.0f s for that job to leave or its lease to "
                    "run out", self._folder.url, _holder(found), _PATIENCE_SECONDS,
                )  # fmt: skip
            time.sleep(0.2 if alive else 0.5)

    def _refuse_other_run(
        self, found: dict[str, Any], run: str | None, *, is_new_run: bool
    ) -> None:
        owner, place = found.get("run"), found.get("run_dir")
        if run is None or owner == run:
            return
        # Without a run: written before runs had a name.
        if place == self._run_dir and (owner is None or is_new_run):
            return
        if place is None:
            raise ConfigError(
                f"{self._key} = {self._folder.url!r} has an {self._name} that names no run; choose "
                "another, or remove that file if no other run uses the folder"
            )
        raise ConfigError(
            f"{self._key} = {self._folder.url!r} belongs to the run in {place!r}; choose another, "
            f"or remove {self._name} there if that run has moved to {self._run_dir!r}"
        )

    def _renew_until_closing(self) -> None:
        away = False
        # Soon at first: a write that came later than `take` waits for is noticed here.
        pause = 1.0
        while not self._closing.wait(pause):
            pause = _RENEW_SECONDS
            try:
                found = self._read()
                # A file that is gone is nobody's: it is written again.
                if found and found.get("job") != self.job:
                    break
                self._folder.write_bytes(self._name, self._content())
                away = False
            except OSError as error:
                # No reason to end training: the folder may be back before anybody wants it.
                if not away:
                    log.warning(
                        "the lease of %s cannot be renewed, training goes on: %s",
                        self._folder.url, error,
                    )  # fmt: skip
                away = True
        else:
            return
        self._lost(
            f"{self._key} = {self._folder.url!r} was taken over by {_holder(found)}; this job ends "
            "and leaves it to that one"
        )

    def _read(self) -> dict[str, Any] | None:
        """Return what the file tells; None if there is none, {} if it is no lease."""
        try:
            found = self._folder.read_json(self._name)
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _content(self, *, held: bool = True) -> bytes:
        content: dict[str, Any] = {"run": self.run, "run_dir": self._run_dir}
        if self.begun_by is not None:
            content["begun_by"] = self.begun_by
        if held:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            content |= {"job": self.job, "time": now, **_this_process()}
        return json.dumps(content, indent=2).encode() + b"\n"


@dataclass(frozen=True)
class Holder:
    """The job that holds a folder, as its lease tells."""

    job: str
    host: str
    pid: int
    run_dir: str
    age_seconds: float
    """Since the lease was renewed, by the clocks of two hosts."""
    is_alive: bool | None
    """None where its process cannot be seen from here."""


def read_holder(folder: Folder, name: str) -> Holder | None:
    """Return the job that holds a folder, None if none does or that cannot be read."""
    try:
        found = folder.read_json(name)
        if "job" not in found:
            return None
        age = (datetime.now(UTC) - datetime.fromisoformat(found["time"])).total_seconds()
        told = (str(found["host"]), int(found["pid"]), str(found["run_dir"]), max(0.0, age))
        return Holder(str(found["job"]), *told, _is_alive(found))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def is_held(folder: Folder, name: str) -> bool:
    """Tell whether a job holds a folder; also where it is on a host that cannot be seen."""
    holder = read_holder(folder, name)
    return holder is not None and holder.is_alive is not False


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    here = {"host": socket.gethostname(), "pid": pid, "started": _start_time(pid)}
    return here | {"boot_id": _boot_id(), "pid_namespace": _pid_namespace()}


def _is_alive(found: dict[str, Any]) -> bool | None:
    """Tell whether a holder runs; None where this machine, or this container, cannot see it."""
    boot_id = _boot_id()
    # A pid means something within one boot and one pid namespace; containers number their own.
    here = (boot_id, _pid_namespace())
    if not boot_id or (found.get("boot_id"), found.get("pid_namespace")) != here:
        return None
    if found["pid"] == os.getpid():
        return found["job"] in _held
    # Another process may have got its pid since.
    return _start_time(found["pid"]) == found.get("started")


def _start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it has ended."""
    try:
        # "pid (name) state ppid ...", where a name may be anything.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie holds nothing. Field 22 of `stat`, counted from 1; the split begins at the third.
    return None if fields[0] in "ZX" else int(fields[19])


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _holder(found: dict[str, Any]) -> str:
    return f"pid {found.get('pid')} on {found.get('host')} (run_dir {found.get('run_dir')})"
