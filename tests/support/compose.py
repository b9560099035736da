"""Start the services of docker/compose.yaml on this machine, without Docker and without an image.

Each service runs its own command with its own environment, volumes and dependencies, as the image's
user and without capabilities, on a host of its own (see hosts.py) and on a read-only root: this
machine's files, and over them what docker/Dockerfile copies into the image. Docker itself and the
packages of the image's system are not tested by this.

    with compose_services(folder) as services:
        services.up("mlflow")
        services["mlflow"].run("mlflow", "--version")
"""

import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dtr_scale.jobs.bench.hosts import PATH, Host, connected_hosts
from tests.support.runs import ROOT

COMPOSE, DOCKERFILE = ROOT / "docker" / "compose.yaml", ROOT / "docker" / "Dockerfile"
USER_ID = 1000
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PATIENCE_SECONDS = 120

# The first process of a container: it puts the root together and becomes the service's command.
_INIT = """\
set -eu
folder=$1; shift
hostname "$1"; shift
mount -t tmpfs layers "$folder/layers"
cd "$folder/layers"
mkdir work root
cp -a "$folder/../image" .
mount -t overlay overlay -o lowerdir=/,upperdir=image,workdir=work root
cd root
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
while IFS='|' read -r source target mode; do
    mkdir -p ".$target"
    if [ "$source" ]; then mount --bind "$source" ".$target"
    else mount -t tmpfs -o noexec,nosuid,nodev tmpfs ".$target"; fi  # Docker's default
    [ "$mode" != ro ] || mount -o remount,bind,ro ".$target"
done < "$folder/mounts"
# Python may be installed in root's home: the container's user may pass through.
while read -r passage; do chmod a+x ".$passage"; done < "$folder/passages"
mount -o remount,ro .
exec chroot . "$@"
"""


class Service:
    """A service's container: started at most once at a time, ended with its host."""

    def __init__(self, name: str, spec: Mapping[str, Any], image: "Image", host: Host) -> None:
        self.name = name
        self.spec = spec
        self.host = host
        self._image = image
        self._folder = image.folder / name
        self._log = self._folder / "log"
        (self._folder / "layers").mkdir(parents=True)
        self.environment = image.environment | spec.get("environment", {})
        self._process: subprocess.Popen[str] | None = None
        self._was_healthy = False

    @property
    def is_started(self) -> bool:
        return self._process is not None

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def start(self, *arguments: str) -> None:
        """Start the service as compose would; `arguments` come after its own command."""
        self._write_mounts()
        to_log = ("sh", "-c", 'exec >> "$0" 2>&1; exec "$@"', str(self._log))
        namespaces = ("unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child")
        init = ("sh", "-c", _INIT, "sh", str(self._folder), self.spec.get("hostname", self.name))
        command = (*self._image.entrypoint, *self.spec["command"], *arguments)
        self._was_healthy = False
        self._process = self.host.start(*to_log, *namespaces, *init, *self._as_user(), *command)

    def wait(self, timeout_seconds: float = _PATIENCE_SECONDS) -> int:
        """Return the exit code."""
        assert self._process
        return self._process.wait(timeout_seconds)

    def stop(self) -> int:
        """Ask it to end, as `docker stop` does, and return the exit code; `up` starts it again."""
        return self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Wait for its end, when it was told to or its host was killed."""
        if self._process:
            self._process.communicate()
            self._process = None

    def call(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in the container, as `docker exec` does."""
        inside = ("nsenter", "--target", self._first_pid(), "--all", "--root")
        return subprocess.run(
            [*inside, *self._as_user(), *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=_PATIENCE_SECONDS, check=False,
        )  # fmt: skip

    def run(self, *command: str) -> str:
        """Return what a command in the container prints; it must succeed."""
        ran = self.call(*command)
        assert ran.returncode == 0, f"{self.name}: {command}:\n{ran.stdout}\n{self.output}"
        return ran.stdout

    def volume(self, name: str) -> Path:
        """Return where a named volume is on this machine."""
        return self._own_folder(f"volumes/{name}")

    def has_reached(self, condition: str) -> bool:
        """Tell whether a condition of `depends_on` is met; AssertionError if it never will be."""
        if not self._process:
            return False
        code = self._process.poll()
        if condition == "service_completed_successfully" and code in (None, 0):
            return code == 0
        assert code is None, f"{self.name} has ended with {code}:\n{self.output}"
        if not self._was_healthy:
            test = self.spec["healthcheck"]["test"]
            assert test[0] == "CMD", f"{self.name}: only CMD is known here"
            self._was_healthy = self.call(*test[1:]).returncode == 0
        return self._was_healthy

    def _end(self, number: signal.Signals) -> int:
        assert self._process
        with contextlib.suppress(subprocess.CalledProcessError):  # it has ended already
            subprocess.run(["kill", f"-{number}", self._first_pid()], check=True)
        code = self.wait()
        self.close()
        return code

    def _as_user(self) -> list[str]:
        user = (f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups")
        rights = ("--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")
        environment = [f"{key}={value}" for key, value in self.environment.items()]
        where = f"--chdir={self._image.workdir}"
        return ["setpriv", *user, *rights, "env", "-i", where, *environment]

    def _first_pid(self) -> str:
        # nsenter has forked what enters the host, and unshare in there the container's first.
        assert self._process
        pid = str(self._process.pid)
        for _ in range(2):
            children = ["pgrep", "--parent", pid]
            pid = subprocess.run(
                children, check=True, capture_output=True, text=True
            ).stdout.strip()
        return pid

    def _write_mounts(self) -> None:
        spec, image = self.spec, self._image
        volumes = {volume["target"]: volume for volume in spec.get("volumes", [])}
        lines = [f"|{path}|" for path in spec.get("tmpfs", [])]
        for target in image.volumes:
            if target not in {*spec.get("tmpfs", []), *volumes}:
                lines.append(f"{self._own_folder(f'{self.name}/{Path(target).name}')}|{target}|")
        # After those, since programs may lie in this machine's /tmp.
        lines += [f"{path}|{target}|ro" for path, target in image.programs]
        for target, volume in volumes.items():
            read_only = "ro" if volume.get("read_only") else ""
            lines.append(f"{self.volume(volume['source'])}|{target}|{read_only}")
        (self._folder / "mounts").write_text("\n".join([*lines, ""]))
        (self._folder / "passages").write_text("\n".join([*self._image.passages, ""]))

    def _own_folder(self, name: str) -> Path:
        path = self._image.folder / name
        if not path.exists():
            path.mkdir(parents=True)
            shutil.chown(path, USER_ID, USER_ID)  # as the image's folder, which Docker copies
        return path


class Services(dict[str, Service]):
    """The services by their names."""

    def up(self, *names: str, arguments: tuple[str, ...] = ()) -> None:
        """Start services after all that they depend on; `arguments` are for the named ones."""
        waiting = self._with_dependencies(names)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while waiting:
            outputs = "\n".join(f"{name}:\n{self[name].output}" for name in self)
            assert time.monotonic() < deadline, f"{waiting} cannot start yet:\n{outputs}"
            for name in list(waiting):
                needs = self[name].spec.get("depends_on", {})
                if all(self[need].has_reached(how["condition"]) for need, how in needs.items()):
                    self[name].start(*(arguments if name in names else ()))
                    waiting.remove(name)
            time.sleep(0.2)

    def _with_dependencies(self, names: tuple[str, ...]) -> list[str]:
        found: list[str] = []
        queue = list(names)
        while queue:
            name = queue.pop()
            if name not in found and not self[name].is_started:
                found.append(name)
                queue += self[name].spec.get("depends_on", {})
        return found


@contextlib.contextmanager
def compose_services(folder: Path) -> Iterator[Services]:
    """Make a container for each service of docker/compose.yaml; all end with the block."""
    specs = read_compose(COMPOSE)["services"]
    with contextlib.ExitStack() as stack:
        services = Services()
        stack.callback(lambda: [service.close() for service in services.values()])
        hosts = stack.enter_context(connected_hosts(len(specs), sshd=False))
        addresses = {name: host.address for name, host in zip(specs, hosts, strict=True)}
        image = Image(folder, addresses)
        for (name, spec), host in zip(specs.items(), hosts, strict=True):
            services[name] = Service(name, spec, image, host)
            if spec.get("network_mode") == "none":
                host.cut()
        yield services


def read_compose(*files: Path) -> dict[str, Any]:
    """Return what Docker Compose reads in its files."""
    command = ["docker-compose", *(f"--file={file}" for file in files), "config", "--format=json"]
    environment = {"PATH": PATH}  # and nothing that would change the file's defaults
    read = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert read.returncode == 0, read.stderr
    assert not read.stderr, read.stderr
    return json.loads(read.stdout)


class Image:
    """What the image's Dockerfile says, and the files that it copies, in place of a built image."""

    def __init__(self, folder: Path, addresses: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = {"PATH": _PATH}
        self.volumes: list[str] = []
        self._read_dockerfile()
        base, venv = Path(sys.base_prefix), Path(sys.prefix).resolve()
        self.programs = [(path, path) for path in (base, venv, ROOT)]
        self.programs.append((venv, Path(self.environment["VIRTUAL_ENV"])))
        # This machine's bytecode serves as well; compiling all packages again takes a minute.
        del self.environment["PYTHONPYCACHEPREFIX"]
        # An editable installation may be of another tree than the one under test.
        self.environment["PYTHONPATH"] = str(ROOT)
        above = {parent for path, _ in self.programs for parent in path.parents}
        closed = [path for path in above if not path.stat().st_mode & 0o001]
        self.passages = sorted(map(str, closed), key=len)
        self._copy_files(folder / "image", addresses)

    def _read_dockerfile(self) -> None:
        _, _, train = DOCKERFILE.read_text().partition(" AS train\n")
        for line in re.sub(r"\\\n", " ", train).splitlines():
            instruction, _, value = line.partition(" ")
            if instruction == "ENV":
                for pair in shlex.split(value):
                    key, _, text = pair.partition("=")
                    self.environment[key] = text.replace("${PATH}", self.environment["PATH"])
            elif instruction == "VOLUME":
                self.volumes = json.loads(value)
            elif instruction == "ENTRYPOINT":
                self.entrypoint = json.loads(value)
            elif instruction == "WORKDIR":
                self.workdir = value

    def _copy_files(self, image: Path, addresses: Mapping[str, str]) -> None:
        workdir = image / self.workdir.lstrip("/")
        for name in ("launch", "configs", "docker/lab"):
            shutil.copytree(ROOT / name, workdir / name)
        for name in ("runs", "data"):
            (workdir / name).symlink_to(f"/shared/{name}")
        for name in ("usr/local/bin", "etc/ssh/ssh_config.d"):
            (image / name).mkdir(parents=True)
        shutil.copy(ROOT / "docker" / "entrypoint.sh", image / "usr/local/bin")
        shutil.copy(ROOT / "docker" / "ssh_config", image / "etc/ssh/ssh_config.d/dtr.conf")
        for name in ("passwd", "group"):
            lines = Path("/etc", name).read_text().splitlines()
            others = [line for line in lines if line.split(":")[2] != str(USER_ID)]
            account = f"dtr:x:{USER_ID}:" + (f"{USER_ID}::/home/dtr:/bin/bash" * (name == "passwd"))
            (image / "etc" / name).write_text("\n".join([*others, account, ""]))
        lines = [f"{address} {name}" for name, address in addresses.items()]
        (image / "etc/hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
