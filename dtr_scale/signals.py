"""Notice requests to leave: a signal, a time limit, a launcher that is gone."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import FrameType

from dtr_scale.launchers import launched_rank

LAUNCHER_PID = "DTR_SCALE_LAUNCHER_PID"
"""Set by a launch script to its own pid: when it is gone, the ranks below it leave."""

_DEEPSPEED, _DEEPSPEED_LAUNCH = "deepspeed", "deepspeed.launcher.launch"
_TORCHRUN = {"torchrun", "torchrun.py", "torch.distributed.run", "torch.distributed.launch"}
_SRUN = "slurmstepd:"  # what `srun` has each node start the ranks by
_SSHD = {"sshd:", "sshd-session:"}  # a connection's process, before and since OpenSSH 9.8
_LAUNCHERS = {*_TORCHRUN, _SRUN, _DEEPSPEED, _DEEPSPEED_LAUNCH}
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class LeaveRequest:
    """Remembers why this rank should checkpoint and leave; None as long as it should not.

    `at_once` is called before a second Ctrl-C ends the process. It runs in a signal handler.
    """

    def __init__(self, *, at_once: Callable[[], None] = lambda: None) -> None:
        self.launched = datetime.now(UTC)
        """When its job was started: what makes one does so before all that takes time."""
        self._at_once = at_once
        self._started_at = time.monotonic()
        self._max_minutes = float("inf")
        self._asked: Callable[[], None] = lambda: None
        self._signal: str | None = None
        self._interrupted = False
        self._launchers = _launchers()

    def enter_loop(
        self, max_minutes: float | None = None, *, asked: Callable[[], None] = lambda: None
    ) -> None:
        """From here on, `max_minutes` after its construction are a reason too.

        `asked` is called each time that somebody asks: the loop does so at every step, and at every
        sampling step of an evaluation.
        """
        self._max_minutes = max_minutes or float("inf")
        self._asked = asked

    @property
    def reason(self) -> str | None:
        self._asked()
        if self._signal:
            return self._signal
        # An orphan gets another parent. This reads /proc at every step: 28 us under `deepspeed`,
        # 0.7 us elsewhere.
        if list(islice(_ancestors(), len(self._launchers))) != self._launchers:
            return "the launcher is gone"
        if time.monotonic() - self._started_at > 60 * self._max_minutes:
            return f"train.max_minutes = {self._max_minutes:g} are over"
        return None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM, SIGUSR1, SIGINT and SIGHUP; a second SIGINT leaves at once.

        A signal that the parent had ignored, as `nohup` does, stays ignored.
        """
        heard = [n for n in _SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                self._at_once()
                # A clean exit would wait for collectives and threads. 130 is a shell's for SIGINT.
                os._exit(130)
            self._interrupted = True
            if launched_rank() == 0:
                # Not `print`: the handler may have interrupted one, and it cannot be entered twice.
                os.write(2, b"\nleaving after this step; Ctrl-C again leaves at once\n")
        # Noted and no more: a handler runs between any two instructions of the loop.
        self._signal = self._signal or signal.Signals(number).name


def _launchers() -> list[int]:
    """Return the pids from this process's parent up to its launcher; none without a launcher.

    A launcher is a known one, or the script that DTR_SCALE_LAUNCHER_PID names. Any other parent may
    go: `nohup dtr-scale train &` outlives its shell. The script counts only above this process:
    ssh and `srun` hand its variable on to machines where it is not.
    """
    ancestors = list(_ancestors())
    script = int(os.environ.get(LAUNCHER_PID) or 0)
    if script in ancestors:
        return ancestors[: ancestors.index(script) + 1]
    launchers = [bool(_command(pid) & _LAUNCHERS) for pid in ancestors]
    if True not in launchers:
        return []
    number = 1 + launchers.index(True)
    # `deepspeed` has each node start the ranks by a process that outlives it.
    if _DEEPSPEED_LAUNCH in _command(ancestors[number - 1]):
        number += _num_of_deepspeed(ancestors[number:])
    return ancestors[:number]


def _num_of_deepspeed(above: list[int]) -> int:
    """Return how many of the processes above a node's own launcher go when `deepspeed` does.

    On its own node that is the command itself. On others it is the ssh connection, often with the
    shell by which sshd runs a command.
    """
    for number, command in enumerate(map(_command, above[:2]), start=1):
        if (_DEEPSPEED in command and number == 1) or command & _SSHD:
            return number
        if "-c" not in command:  # a user's shell, which may go: nobody types `-c`
            break
    return 0


def _command(pid: int) -> set[str]:
    """Return the words of a process's command, without their folders."""
    words = _process_file(pid, "cmdline").decode(errors="replace").split("\0")
    # SLURM and sshd write "slurmstepd: [job.step]" and "sshd: user@notty" over their commands.
    return {word.rpartition("/")[2] for word in [*words, words[0].partition(" ")[0]]}


def _ancestors() -> Iterator[int]:
    """Yield the pids of the parent, its parent, and so on, as far as they can be seen."""
    pid = os.getppid()
    while pid:
        yield pid
        # "pid (name) state ppid ...", where a name may be anything.
        stat = _process_file(pid, "stat").rpartition(b")")[2].split()
        pid = int(stat[1]) if stat else 0


def _process_file(pid: int, name: str) -> bytes:
    """Return what the kernel tells of a process; nothing if it is gone or somebody else's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
