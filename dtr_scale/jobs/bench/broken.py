"""Run a training on two ranks under its supervisor, and break it in all ways."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from dtr_scale.errors import EngineError
from dtr_scale.jobs.bench.faulty import HANG, HOLD_GIL, MODULE
from dtr_scale.jobs.bench.hosts import Hosts
from dtr_scale.tracking.attempts import read_attempts
from dtr_scale.tracking.journal import TIMINGS, Record, read_journal
from dtr_scale.train.run_dir import JOURNAL, STATUS, find_object

_TOKEN = "DTR_SCALE_BENCH_FAULTS"
SIGNALS = {
    "killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "gil": HOLD_GIL, "hung": HANG
}  # fmt: skip
"""What is sent to a rank: it is killed, stopped, holds its GIL for good, or stands still."""
ON_HOSTS = ("cut", "lost")
"""A host's cable is pulled and put back, or the host loses power and boots again."""
_CUT_SECONDS, _OFF_SECONDS = 15.0, 3.0
_POLL_SECONDS, _PATIENCE_SECONDS = 0.02, 240.0
_TAIL_BYTES = 4096
_ENDPOINT = "node1:29400"


class Fault(NamedTuple):
    """One fault, and what it cost."""

    kind: str
    rank: int
    step: int
    """The journal's last step when it happened."""
    noticed_seconds: float
    """Until status.json told of it."""
    restart_seconds: float
    """Until the first new step of the next attempt stood in the journal."""
    resumed_step: int


class Run:
    """A training on two ranks, under a supervisor here or one on each host."""

    def __init__(
        self, arguments: Sequence[str], run_dir: Path, hosts: Hosts | None, *, restarts: int
    ) -> None:
        self._run_dir = run_dir
        self._hosts = hosts
        self._token = f"{os.getpid()}-{run_dir.name}"
        self._options = ["--restarts", str(restarts), "--", *arguments, f"--run_dir={run_dir}"]
        self._supervisors: dict[int, subprocess.Popen[Any]] = {}
        self.records_seen: list[Record] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        for host in range(len(self._hosts or [0])):
            self._start(host)
        try:
            yield
        finally:
            for supervisor in self._supervisors.values():
                with suppress(ProcessLookupError):
                    os.killpg(supervisor.pid, signal.SIGKILL)
                supervisor.communicate()
            for rank in range(2):
                for pid in self._pids(rank):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

    @property
    def last_step(self) -> int:
        """Of the journal's last whole line; its end alone is read, many times a second."""
        with suppress(OSError), (self._run_dir / JOURNAL).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            *_, line = [b"{}", *file.read().split(b"\n")[:-1]]
            with suppress(ValueError):
                return json.loads(line).get("step", 0)
        return 0

    def has_ended(self) -> bool:
        """Whether the training has finished; EngineError if it has ended otherwise."""
        codes = {host: s.poll() for host, s in self._supervisors.items()}
        if any(codes.values()):
            self._raise(f"supervisors ended with {codes}")
        return all(code == 0 for code in codes.values())

    def wait_for(self, condition: Callable[[], object], seconds: float | None = None) -> None:
        """Return when a condition holds; EngineError if the run stands still before."""
        deadline, before = time.monotonic() + _PATIENCE_SECONDS, self.last_step
        while not condition():
            if (step := self.last_step) != before:
                deadline, before = time.monotonic() + _PATIENCE_SECONDS, step
            self.has_ended()
            if time.monotonic() > deadline:
                self._raise(f"nothing has moved for {_PATIENCE_SECONDS:.0f} s")
            time.sleep(_POLL_SECONDS)

    def suffer(self, kind: str, rank: int) -> Fault:
        """Make a fault, and wait until the next attempt has made a step."""
        num_attempts, step = len(read_attempts(self._run_dir)), self.last_step
        began = time.perf_counter()
        undo = self._break(kind, rank)
        self.wait_for(self._has_failed)
        noticed = time.perf_counter() - began
        undo(began)
        self.wait_for(lambda: len(read_attempts(self._run_dir)) > num_attempts)
        resumed = read_attempts(self._run_dir)[-1].step
        self.wait_for(lambda: self.last_step > resumed)
        return Fault(kind, rank, step, noticed, time.perf_counter() - began, resumed)

    def records(self) -> list[Record]:
        """Return the journal without what tells the time."""
        self.records_seen = list(read_journal(self._run_dir / JOURNAL))
        return [{k: v for k, v in r.items() if k not in TIMINGS} for r in self.records_seen]

    def _break(self, kind: str, rank: int) -> Callable[[float], None]:
        """Make a fault; return what makes it good, given when it was made."""
        if kind in SIGNALS:
            (pid,) = self._pids(rank)
            os.kill(pid, SIGNALS[kind])
            return lambda began: None
        assert self._hosts
        host = self._hosts[rank]
        host.cut()
        if kind == "cut":
            return lambda began: _after(began, _CUT_SECONDS, host.join)
        host.kill()
        self._supervisors.pop(rank).communicate()

        def boot() -> None:
            host.boot()
            self._start(rank)  # as the host's own service does

        return lambda began: _after(began, _OFF_SECONDS, boot)

    def _has_failed(self) -> bool:
        return find_object(self._run_dir / STATUS).get("outcome") == "failed"

    def _start(self, host: int) -> None:
        nodes = ["--nproc", "2"]
        if self._hosts:
            nodes = ["--nproc", "1", "--nnodes", "2", "--node-rank", str(host)]
            nodes += ["--rdzv-endpoint", _ENDPOINT]
        command = [sys.executable, "-m", MODULE, "supervise", *nodes, *self._options]
        environment = os.environ | {_TOKEN: self._token}
        self._run_dir.parent.mkdir(parents=True, exist_ok=True)
        if self._hosts:
            # Through a shell, as it is this machine's file that all hosts write to.
            command = [
                "sh",
                "-c",
                'log=$1; shift; exec "$@" >> "$log" 2>&1',
                "sh",
                self._log,
                *command,
            ]
            self._supervisors[host] = self._hosts[host].start(*command, environment=environment)
            return
        with Path(self._log).open("ab") as log:
            self._supervisors[host] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def _log(self) -> str:
        return f"{self._run_dir}.log"

    def _pids(self, rank: int) -> list[int]:
        """Return the pid of a rank as this machine sees it, also where it is a host's process."""
        wanted = {f"{_TOKEN}={self._token}".encode(), f"RANK={rank}".encode()}
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if wanted <= set((place / "environ").read_bytes().split(b"\0")):
                    found.append(int(place.name))
        return found

    def _raise(self, what: str) -> None:
        with suppress(OSError):
            lines = Path(self._log).read_text(errors="replace").splitlines()
            told = "\n".join(line for line in lines if " step " not in line)
            raise EngineError(f"{self._run_dir.name}: {what}; its log:\n{told[-4000:]}")
        raise EngineError(f"{self._run_dir.name}: {what}")


def _after(began: float, seconds: float, action: Callable[[], None]) -> None:
    time.sleep(max(0.0, began + seconds - time.perf_counter()))
    action()
