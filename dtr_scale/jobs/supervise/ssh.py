"""Start the supervisors of other hosts by ssh, and again when a host comes back."""

import json
import logging
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dtr_scale.errors import ConfigError, EngineError
from dtr_scale.jobs.supervise.signals import START_AGAIN

log = logging.getLogger(__name__)

_LINE = re.compile(r"(?P<name>[^\s#]+)(?:\s+slots=(?P<slots>\d+))?\s*(?:#.*)?")
# A short cut of the network is outlived; a host that has booted again answers at once that it
# knows nothing of the connection.
_OPTIONS = (
    "BatchMode=yes",
    "ConnectTimeout=10",
    "ServerAliveInterval=10",
    "ServerAliveCountMax=60",
)
_LOST = 255  # ssh's own exit code, by which no command ends
_AGAIN_SECONDS, _END_SECONDS = 3.0, 30.0
_STOOD_SECONDS = 30.0  # longer than a host that is away keeps ssh waiting
_EXPORTED = re.compile(
    r"(AWS|DTR_SCALE|GLOO|HF|MLFLOW|NCCL|OMP|PYTHON|TORCH|UCX)_?\w*|(HTTPS?|NO)_PROXY", re.I
)
"""Variables that ranks on other hosts are to have as well.

They go through ssh's stdin: on a command line, other users of the hosts could read them.
"""


class HostLine(NamedTuple):
    """One host of a hostfile, and how many ranks it has if that is told."""

    name: str
    slots: int | None


def read_hostfile(path: Path) -> list[HostLine]:
    """Return the hosts of a file as DeepSpeed's: a name a line, with `slots=8` for 8 ranks.

    ConfigError if there is none, or the first is not this machine.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--hostfile {path} cannot be read: {error.strerror}") from None
    hosts = []
    for line in filter(None, map(str.strip, lines)):
        if line.startswith("#"):
            continue
        found = _LINE.fullmatch(line)
        if not found:
            raise ConfigError(f"--hostfile {path} has {line!r}; accepted is NAME or NAME slots=8")
        hosts.append(HostLine(found["name"], int(found["slots"]) if found["slots"] else None))
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host; give a line `NAME slots=8` for each")
    if not _is_here(hosts[0].name):
        raise ConfigError(
            f"--hostfile {path}: the first host is {hosts[0].name}, this is "
            f"{socket.gethostname()}; start the supervisor there, or put this host first"
        )
    return hosts


class RemoteSupervisors:
    """The supervisors of the other hosts, each kept alive by a thread that holds its ssh."""

    def __init__(
        self, hosts: Sequence[HostLine], arguments: Callable[[int], Sequence[str]]
    ) -> None:
        """`arguments(node_rank)` are what a host's `dtr-scale supervise` is started with."""
        self._closing = threading.Event()
        self._failure: str | None = None
        self._threads = [
            threading.Thread(target=self._keep, args=(host.name, arguments(node)), daemon=True)
            for node, host in enumerate(hosts)
            if node > 0
        ]
        for thread in self._threads:
            thread.start()

    def check(self) -> None:
        """Raise EngineError if one of them cannot be started."""
        if self._failure:
            raise EngineError(self._failure)

    def close(self) -> None:
        """Wait until they have ended as this host's has; whatever is left then goes with ssh."""
        self._closing.set()
        deadline = time.monotonic() + _END_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _keep(self, host: str, arguments: Sequence[str]) -> None:
        command = [*map(shlex.quote, [sys.executable, "-m", "dtr_scale", "supervise", *arguments])]
        remote = f"cd {shlex.quote(str(Path.cwd()))} && exec {' '.join(command)}"
        options = [word for option in _OPTIONS for word in ("-o", option)]
        told = False
        while not self._closing.is_set():
            began = time.monotonic()
            # A host that has gone with its ranks is reached again once it has booted.
            code = self._run(["ssh", *options, host, remote])
            if code != _LOST:
                break
            told = told and time.monotonic() - began < _STOOD_SECONDS
            if not told:
                log.warning("the connection to %s is lost; it is tried again", host)
                told = True
            self._closing.wait(_AGAIN_SECONDS)
        else:
            return
        if code not in (0, 1, START_AGAIN):
            self._failure = (
                f"the supervisor on {host} ended with {code}; this repository, its .venv and the "
                "data must be there under the same paths"
            )

    def _run(self, command: Sequence[str]) -> int:
        # In a session of its own: a Ctrl-C is for this process, which hands it on.
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as ssh:
            assert ssh.stdin
            try:
                ssh.stdin.write(json.dumps(_exported()).encode() + b"\n")
                # Left open: its end tells the other host that this one is gone.
                ssh.stdin.flush()
            except BrokenPipeError:
                pass  # as its exit code tells
            return ssh.wait()


def _exported() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if _EXPORTED.fullmatch(name)}


def follow_parent(lost: Callable[[], None]) -> None:
    """Take the variables of the host that has started this one; call `lost` when it is gone."""
    os.environ.update(json.loads(sys.stdin.readline() or "{}"))

    def wait() -> None:
        sys.stdin.read()
        lost()

    threading.Thread(target=wait, daemon=True).start()


def _is_here(name: str) -> bool:
    # On many machines their own name resolves to no address.
    if name == socket.gethostname():
        return True
    try:
        with socket.create_server((name, 0)):
            return True
    except OSError:
        return False
