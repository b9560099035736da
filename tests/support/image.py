"""The container image, built by buildah as root, and containers of it.

The base image is not fetched: a Debian made by mmdebstrap has its name. buildah uses `chroot`
instead of an engine's namespaces, so what needs those (a read-only root, a first process) goes
through `unshare` here.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.runs import ROOT

PROGRAMS = ("buildah", "ip", "mmdebstrap", "setpriv", "unshare")
PACKAGES = "buildah iproute2 mmdebstrap util-linux"
# The container, its layers as files, these again on the way into the storage, and there.
DISK_BYTES = 33e9
BASE = "docker.io/nvidia/cuda:12.8.1-base-ubuntu24.04"
USER_ID = 1000
# What a network with a certificate authority of its own needs; a mount leaves it out of the layers.
_CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

# The first process of a container without an engine: $1 is its root, $2 the folder of its volumes.
_CONTAINER = """\
set -eu
root=$1 volumes=$2; shift 2
ip link set lo up
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
for volume in home/dtr shared tmp; do mount --bind "$volumes/$volume" "$root/$volume"; done
mount -o remount,ro,bind "$root"
exec chroot "$root" setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs \
    --bounding-set=-all env --chdir /opt/dtr_scale "$@"
"""


@dataclass(frozen=True)
class Layer:
    """One layer, and where its files are: those of the layer alone, or of all up to it."""

    size: int  # bytes, uncompressed
    folder: Path


class Image:
    """The image of docker/Dockerfile, and one working container of it, all below one folder."""

    def __init__(self, folder: Path) -> None:
        missing = [program for program in PROGRAMS if not shutil.which(program)]
        assert not missing, f"{missing} missing; fix: install Debian's packages {PACKAGES}"
        assert os.geteuid() == 0, "images are built by root only; fix: run this test as root"
        self._folder = folder
        self.volumes = folder / "volumes"
        for volume in ("home/dtr", "shared", "tmp"):
            (self.volumes / volume).mkdir(parents=True)
            os.chown(self.volumes / volume, USER_ID, USER_ID)
        (folder / "scratch").mkdir()
        # overlay shares the files of images and containers; vfs copies 8 GB for each.
        self._driver = "overlay"
        if self._buildah("info", check=False).returncode:
            self._driver = "vfs"
        try:
            self._build()
        except BaseException:
            self.remove()
            raise

    def _build(self) -> None:
        base = self._buildah("from", "scratch").stdout.strip()
        options = ["--quiet", "--variant=apt", "--include=ca-certificates"]
        target = self._buildah("mount", base).stdout.strip()
        subprocess.run(["mmdebstrap", *options, "bookworm", target], check=True)
        self._buildah("commit", "--quiet", "--rm", "--format=docker", base, BASE)
        files = ["--file=docker/Dockerfile", "--ignorefile=docker/Dockerfile.dockerignore"]
        mount = [f"--volume={_CERTIFICATES}:{_CERTIFICATES}:ro"] if _CERTIFICATES.exists() else []
        # Without --layers a stage is one layer.
        self._buildah(
            "build", "--isolation=chroot", "--format=docker", "--pull-never", "--layers=false",
            *files, *mount, "--target=train", "--tag=train", ".",
        )  # fmt: skip
        self._container = self._buildah("from", "--pull-never", "train").stdout.strip()
        self.root = Path(self._buildah("mount", self._container).stdout.strip())

    def _buildah(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        storage = [f"--root={self._folder}/root", f"--runroot={self._folder}/runroot"]
        done = subprocess.run(
            ["buildah", f"--storage-driver={self._driver}", *storage, *arguments],
            cwd=ROOT,
            env=os.environ | {"TMPDIR": str(self._folder / "scratch")},
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise AssertionError(
                f"buildah {arguments}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        return done

    def run(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        mounts: Sequence[str] = (),
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command as the image's user; its volumes outlive it. `mounts`: SOURCE:TARGET:ro."""
        volumes = [f"{self.volumes}/{name}:/{name}" for name in ("home/dtr", "shared", "tmp")]
        options = [f"--volume={mount}" for mount in (*volumes, *mounts)]
        options += [f"--env={name}={value}" for name, value in (environment or {}).items()]
        return self._buildah(
            "run", "--isolation=chroot", *options, self._container, "--", *command, check=False
        )

    def start_read_only(
        self, *command: str, environment: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Start a container as an engine would: a root that nobody can write to, its entrypoint."""
        variables = dict(pair.split("=", 1) for pair in self.config["Env"])
        namespaces = ["--mount", "--pid", "--net", "--uts", "--ipc"]
        return subprocess.Popen(
            ["unshare", *namespaces, "--fork", "--kill-child", "sh", "-c", _CONTAINER, "sh",
             self.root, self.volumes, *self.config["Entrypoint"], *command],
            env=variables | {"PATH": f"{variables['PATH']}"} | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    @property
    def config(self) -> dict[str, Any]:
        """Return what the image tells an engine: its user, volumes, entrypoint, health check."""
        inspected = self._buildah("inspect", "--type=image", "train").stdout
        return json.loads(inspected)["Docker"]["config"]

    @property
    def layers(self) -> list[Layer]:
        """Return the layers, the base's first."""
        storage = self._folder / "root"
        images = json.loads((storage / f"{self._driver}-images/images.json").read_text())
        known = json.loads((storage / f"{self._driver}-layers/layers.json").read_text())
        by_id = {layer["id"]: layer for layer in known}
        (top,) = (image["layer"] for image in images if "localhost/train:latest" in image["names"])
        layers = []
        while top:
            place = f"overlay/{top}/diff" if self._driver == "overlay" else f"vfs/dir/{top}"
            layers.insert(0, Layer(by_id[top]["diff-size"], storage / place))
            top = by_id[top].get("parent")
        return layers

    def remove(self) -> None:
        """Remove the image, its containers and the folder."""
        self._buildah("rm", "--all", check=False)
        shutil.rmtree(self._folder)
