"""A real SLURM cluster on this machine: a controller and two nodes of four cores and two GPUs.

A job in the partition `urgent` has those in the other one requeued, after a minute of grace.

The nodes are two daemons beside each other; cores and GPUs are only counted.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.support.runs import ROOT

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"], "/usr/sbin"])

# A requeued job waits until its credential is over, 5 seconds at least, and for the next look at
# the queue. Cores and GPUs are whatever is said here.
SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=DEFAULT CPUs=4 Gres=gpu:2
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


class SlurmCluster:
    """The daemons, all of whose files are in one folder; jobs run as root."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        host = socket.gethostname().partition(".")[0]
        # Rank 0 is looked for under its node's name.
        self.nodes = (host, f"{host}-second")
        (folder / "slurm.conf").write_text(
            SLURM_CONF.format(folder=folder, host=host, nodes=self.nodes, ports=_free_ports(3))
        )
        # Any device counts as a GPU.
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        # Nothing of a job in which the tests may run themselves.
        # Runs in this process leave the variables of a launcher behind.
        left = ("SLURM", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE")
        outside = {k: v for k, v in os.environ.items() if not k.startswith(left)}
        self._environment = outside | {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        places = [f"--{option}={self._folder / name}" for option, name in files.items()]
        # By force: it would have every user reach its socket.
        self._start("munged", "--foreground", "--force", *places)
        self._wait_for((self._folder / "munge.socket").exists)
        self._start("slurmctld", "-D", "-c")
        for node in self.nodes:
            self._start("slurmd", "-D", "-N", node)
        self._wait_for(self._is_up)

    def stop(self) -> None:
        """End all jobs, then the daemons."""
        with contextlib.suppress(AssertionError):  # whatever is broken, the daemons are to end
            self.run("scancel", "--full", "--signal=KILL", "--state=running")
            self.run("scancel", "--user=root")
            self._wait_for(lambda: not self.run("squeue", "-h"))
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            daemon.wait(timeout=20)

    def run(self, *command: str, timeout_seconds: float = 10, cwd: Path = ROOT) -> str:
        """Return what a command prints; it must succeed."""
        ended = self._run(command, timeout_seconds, cwd)
        assert ended.returncode == 0, f"{command}:\n{ended.stdout}\n{ended.stderr}\n{self._logs()}"
        return ended.stdout

    def _run(
        self, command: Sequence[str], timeout_seconds: float, cwd: Path = ROOT
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            # Other than a SIGKILL, its SIGTERM lets srun end the job.
            ["timeout", str(timeout_seconds), *command],
            cwd=cwd,
            env=self._environment,
            capture_output=True,
            text=True,
        )

    def _is_up(self) -> bool:
        # A node stands there once for each partition.
        states = self._run(["sinfo", "-hN", "--partition=main", "-o", "%T"], 2).stdout.split()
        return states == ["idle", "idle"]

    def _start(self, *command: str) -> None:
        with (self._folder / f"{command[0]}.out").open("ab") as log:
            daemon = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tests, which stop the daemons in order
            )
        self._daemons.append(daemon)

    def _wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            alive = all(daemon.poll() is None for daemon in self._daemons)
            assert alive and time.monotonic() < deadline, self._logs()
            time.sleep(0.05)

    def _logs(self) -> str:
        return "\n".join(path.read_text() for path in self._folder.glob("*.out"))


@contextlib.contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Start a cluster and stop it; its folder has a short name, as sockets need."""
    missing = [daemon for daemon in DAEMONS if not shutil.which(daemon, path=PATH)]
    packages = "munge, slurm-client, slurmctld and slurmd"
    assert not missing, f"{missing} missing; fix: install Debian's packages {packages}"
    assert os.geteuid() == 0, "SLURM's daemons start as root only; fix: run this test as root"
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = SlurmCluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(num)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
