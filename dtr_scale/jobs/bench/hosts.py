"""Several hosts on this machine: each with its own network, name, processes, and sshd on port 2222.

`hosts[0]` is called node1, `hosts[1]` node2, and so on; they know each other by these names, and
root on one logs in to the others by `ssh`. A bridge joins them and has an address of this machine,
`hosts.address`, where servers can be reached from the hosts. They share this machine's disk.

    with connected_hosts(2) as hosts:
        hosts[0].run("ssh", "node2", "hostname")
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

from dtr_scale.errors import EngineError

PROGRAMS = ("ip", "nsenter", "pdsh", "pgrep", "setpriv", "ssh", "sshd", "unshare")
PACKAGES = "iproute2 openssh-client openssh-server pdsh procps"
PORT = 2222
# sshd goes by its full path, and /usr/sbin is not on every PATH.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])

# The first process of a host, as long as it runs. It waits for the cable, so that sshd can
# bind to its address. In one /dev/shm, files named after a pid would clash between the hosts.
_INIT = """\
set -eu
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs shm /dev/shm
echo ready
read -r plugged
[ "$4" = sshd ] || exec sleep infinity
exec /usr/sbin/sshd -D -e -f "$2/sshd_config" -o "ListenAddress=$plugged:$3"
"""
_SSHD_CONFIG = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PidFile none
# The folder may be below one that everybody can write to, as /tmp.
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
"""
_SSH_CONFIG = """\
Port {port}
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


class Host:
    """One host; its processes die with this one, however it ends."""

    def __init__(
        self, name: str, address: str, bridge: str, folder: Path, *, sshd: bool = True
    ) -> None:
        self.name = name
        self.address = address
        self._card = "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
        self._bridge = bridge
        self._port = f"{bridge}{name}"  # of the bridge; the host's end of the cable is eth0
        self._folder = folder
        self._sshd = sshd
        self._init: subprocess.Popen[str] | None = None

    def boot(self) -> None:
        """Start the host, or start it again after a `kill`; it answers to ssh when this returns."""
        namespaces = ("--net", "--uts", "--ipc", "--mount", "--pid", "--mount-proc")
        with (self._folder / "log").open("a") as log:
            self._init = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "--fork", "--kill-child",
                 "sh", "-c", _INIT, "sh", self.name, str(self._folder), str(PORT),
                 "sshd" if self._sshd else ""],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={"PATH": PATH}, start_new_session=True,
            )  # fmt: skip
        assert self._init.stdin and self._init.stdout
        assert self._init.stdout.readline() == "ready\n", (self._folder / "log").read_text()
        # A host comes back with the address of its network card, which the others remember.
        card = ("name", "eth0", "address", self._card, "netns", str(self._init.pid))
        _ip("link", "add", self._port, "type", "veth", "peer", *card)
        _ip("link", "set", self._port, "master", self._bridge, "up")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")
        self._init.stdin.write(f"{self.address}\n")
        self._init.stdin.flush()
        # It binds within milliseconds, long before the host's own ssh has started for another try.
        if self._sshd:
            self.run("ssh", "-o", "ConnectionAttempts=20", self.name, "true")

    def start(
        self, *command: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a command, whose output is one pipe; `environment` is added to this process's."""
        assert self._init, f"{self.name} is down"
        host = ("nsenter", "--target", self._first_pid(self._init), "--all")
        return subprocess.Popen(
            # A folder is found by its name in the host's own mounts, hence from within.
            [*host, "env", "--chdir", str(cwd or Path.cwd()), *command],
            env=os.environ | {"PATH": PATH} | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_seconds: float = 60,
    ) -> str:
        """Return what a command prints; it must succeed."""
        with self.start(*command, environment=environment, cwd=cwd) as process:
            try:
                output, _ = process.communicate(timeout=timeout_seconds)
            except BaseException:
                self.signal(process, signal.SIGKILL)
                raise
        assert process.returncode == 0, f"{self.name}: {command}:\n{output}"
        return output

    def signal(self, process: "subprocess.Popen[str]", number: signal.Signals) -> None:
        """Send a signal to a command that `start` has started, and to nothing below it."""
        with contextlib.suppress(subprocess.CalledProcessError, ProcessLookupError):
            os.kill(int(self._first_pid(process)), number)

    def kill(self) -> None:
        """End all processes by SIGKILL. The kernel still closes their connections; `cut` first
        for a power cut, of which the others are told nothing.
        """
        if self._init:
            # The first process of a pid namespace takes all others along; then `unshare` ends.
            self.signal(self._init, signal.SIGKILL)
            self._init.communicate()
            self._init = None
            with contextlib.suppress(subprocess.CalledProcessError):  # it went with the host
                _ip("link", "delete", self._port)

    def cut(self) -> None:
        """Pull the network cable."""
        _ip("link", "set", self._port, "down")

    def join(self) -> None:
        """Put the network cable back in."""
        _ip("link", "set", self._port, "up")

    @staticmethod
    def _first_pid(entered: "subprocess.Popen[str]") -> str:
        """Return the pid of what `unshare` or `nsenter` has forked into the namespace."""
        children = ["pgrep", "--parent", str(entered.pid)]
        return subprocess.run(children, check=True, capture_output=True, text=True).stdout.strip()


class Hosts(Sequence[Host]):
    """The hosts, in order, and the address by which they reach this machine."""

    def __init__(self, hosts: Sequence[Host], address: str) -> None:
        self._hosts = hosts
        self.address = address

    @overload
    def __getitem__(self, index: int) -> Host: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Host]: ...
    def __getitem__(self, index: int | slice) -> Host | Sequence[Host]:
        return self._hosts[index]

    def __len__(self) -> int:
        return len(self._hosts)


@contextlib.contextmanager
def connected_hosts(num: int, *, sshd: bool = True) -> Iterator[Hosts]:
    """Boot `num` hosts in a network of their own, and end them; without sshd port 2222 is free."""
    missing = [program for program in PROGRAMS if not shutil.which(program, path=PATH)]
    if missing:
        raise EngineError(f"{missing} missing; install Debian's packages {PACKAGES}")
    if os.geteuid() != 0:
        raise EngineError("hosts are namespaces of Linux, made by root only; run this as root")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hosts-")))
        bridge, network = _bridge()
        stack.callback(_ip, "link", "delete", bridge)
        machine = f"{network}.254"
        _ip("address", "add", f"{machine}/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        addresses = {f"node{number}": f"{network}.{number}" for number in range(1, num + 1)}
        _write_files(folder, addresses)
        hosts = [Host(name, addresses[name], bridge, folder, sshd=sshd) for name in addresses]
        for host in hosts:
            stack.callback(host.kill)
            host.boot()
        yield Hosts(hosts, machine)


def _bridge() -> tuple[str, str]:
    """Make a bridge; return its name and the start of its addresses, which nobody else has here."""
    for number in range(256):
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "add", f"dtr{number}", "type", "bridge")
            return f"dtr{number}", f"10.77.{number}"
    raise EngineError("no bridge can be made; run this where `ip link add` is allowed")


def _write_files(folder: Path, addresses: dict[str, str]) -> None:
    lines = [f"{address} {name}" for name, address in addresses.items()]
    (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
    (folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder, port=PORT))
    (folder / "sshd_config").write_text(_SSHD_CONFIG.format(folder=folder))
    # One key is enough, for the hosts and for their user.
    new_key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")]
    subprocess.run(new_key, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, which a system's service would make


def _ip(*arguments: str) -> None:
    subprocess.run(
        ["ip", *arguments], check=True, capture_output=True, text=True, env={"PATH": PATH}
    )
