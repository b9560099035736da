"""The commands of docker/README.md as they stand there, typed without Docker.

`docker run` starts a container of tests/support/compose.py, on a host for each node. There is no
GPU: its options are read, and DeepSpeed is told to take the CPU.
"""

import argparse
import contextlib
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dtr_scale.jobs.bench.hosts import Host, connected_hosts
from tests.support.compose import USER_ID, Image, Service
from tests.support.processes import wait_for
from tests.support.runs import status
from tests.support.typed import brief_experiments, commands_of

pytestmark = [pytest.mark.slow, pytest.mark.services]
README = "docker/README.md"
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def _docker() -> argparse.ArgumentParser:
    """Return what reads the options that the README gives to `docker run`."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--rm", "-d"):
        parser.add_argument(flag, action="store_true")
    for option in ("--name", "--network", "--gpus", "--ipc", "--ulimit", "--stop-timeout"):
        parser.add_argument(option)
    parser.add_argument("-v", action="append", default=[])
    parser.add_argument("image", choices=["dtr_scale"])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    return parser


class Nodes:
    """Hosts on which commands are typed; containers that go on in the background end with them."""

    def __init__(self, folder: Path, hosts: Sequence[Host]) -> None:
        self.folder = folder
        self.shared = folder / "volumes" / "shared"  # by NFS, or on the one node's disk
        self.shared.mkdir(parents=True)
        shutil.chown(self.shared, USER_ID, USER_ID)
        self.hosts = hosts
        self._image = Image(folder, {host.name: host.address for host in hosts})
        brief_experiments(folder / "image" / self._image.workdir.lstrip("/") / "configs")
        self.services: list[Service] = []

    def type(self, host: Host, commands: str, shared: str) -> str:
        """Return what commands print; each must succeed. `shared` is the README's folder."""
        output = ""
        for line in commands.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["docker", "run"]:
                output += self._run(host, words[2:], shared)
            else:
                here = line.replace(shared, str(self.shared))
                subprocess.run(["bash", "-ec", here], check=True)
        return output

    def _run(self, host: Host, words: list[str], shared: str) -> str:
        read = _docker().parse_args(words)
        name = f"{host.name}-{len(self.services)}"
        places = {shared: "shared", "dtr_home": f"home-{host.name}"}
        volumes = [volume.split(":") for volume in read.v]
        spec: dict[str, Any] = {
            "hostname": host.name,
            "command": read.command,
            "environment": CPU,
            "volumes": [{"source": places[source], "target": to} for source, to in volumes],
        }
        service = Service(name, spec, self._image, host)
        self.services.append(service)
        service.start()
        if not read.d:
            assert service.wait(timeout_seconds=300) == 0, service.output
        return service.output


@pytest.fixture
def nodes(tmp_path):
    with contextlib.ExitStack() as stack:
        hosts = stack.enter_context(connected_hosts(2, sshd=False))
        made = Nodes(tmp_path, hosts)
        # After the hosts have ended, and what runs there.
        stack.callback(lambda: [service.close() for service in made.services])
        stack.callback(lambda: [host.kill() for host in hosts])
        yield made


def test_many_nodes(nodes):
    first, other = nodes.hosts
    nodes.type(other, commands_of(README, "On every node but the first"), "/nfs/dtr")
    waiting = nodes.services[-1]
    wait_for((nodes.shared / "ssh/id").exists)
    wait_for(lambda: waiting.call("test", "-e", "/tmp/sshd.pid").returncode == 0)
    output = nodes.type(first, commands_of(README, "Then on the first"), "/nfs/dtr")
    assert "on 2 hosts (node1, node2)" in output
    assert status(nodes.shared / "runs/two_nodes")["outcome"] == "finished"


@pytest.mark.exhaustive
def test_one_node(nodes):
    output = nodes.type(nodes.hosts[0], commands_of(README, "## Run on one node"), "/data/dtr")
    assert "usage: dtr-scale COMMAND" in output
    assert status(nodes.shared / "runs/demo_digits")["outcome"] == "finished"
