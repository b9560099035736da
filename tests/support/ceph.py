"""A real S3 server: Ceph's gateway over one monitor and one object store, all on this machine.

The store keeps its objects in memory (`memstore`): up in 1.3 s, where `bluestore` needs 6 s to lay
out and sync a disk of its own. It takes 0.15 GB and twice what is stored, `max_bytes` at most; then
writes hang.
"""

import http.client
import os
import shutil
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.session

from tests.support.processes import free_port

PACKAGES = "radosgw ceph-mon ceph-osd"
PATIENCE_SECONDS = 60
_GIB = 2**30
_DYING_WITH_US = ("setpriv", "--pdeathsig", "KILL")

_CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{monitor_port}]
ms bind msgr1 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {directory}/keyring
mon data = {directory}/mon
osd data = {directory}/osd
rgw data = {directory}
run dir = {directory}
crash dir = {directory}
log file = {directory}/$name.log
mon cluster log file = {directory}/cluster.log
# A path in a test's folder is soon too long for a socket.
admin socket =
osd objectstore = memstore
memstore device bytes = {max_bytes}
# One copy, one placement group, no waiting for votes.
osd pool default size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon data avail crit = 0
paxos propose interval = 0.05
paxos min wait = 0.01
# Without tcp_nodelay each answer waits 40 ms for an acknowledgement.
rgw frontends = beast endpoint={host}:{gateway_port} tcp_nodelay=1
rgw override bucket index max shards = 1
# What is removed leaves the memory at once, not after two hours.
rgw gc obj min wait = 1
rgw gc processor period = 1
"""
_KEYRING = """\
[mon.]
key = {key}
caps mon = "allow *"
[client.admin]
key = {key}
caps mon = "allow *"
caps osd = "allow *"
[osd.0]
key = {key}
caps mon = "allow profile osd"
caps osd = "allow *"
"""


class CephServer:
    """A server with one user and one bucket; its gateway can be killed and started again.

    The gateway is at the address `host` of this machine. Its processes die with this one, however
    it ends.
    """

    def __init__(
        self,
        directory: Path,
        key: str,
        secret: str,
        bucket: str,
        *,
        host: str = "127.0.0.1",
        max_bytes: int = 4 * _GIB,
    ) -> None:
        missing = [name for name in ("setpriv", *PACKAGES.split()) if not shutil.which(name)]
        if missing:
            raise FileNotFoundError(
                f"the tests' S3 server is missing ({', '.join(missing)}); "
                f"fix: apt-get install {PACKAGES}"
            )
        self._directory = directory
        # A process that is to die with its parent dies with the thread that started it.
        self._starter = ThreadPoolExecutor(max_workers=1)
        self._processes: list[subprocess.Popen[bytes]] = []
        # Nothing of the user's own: CEPH_CONF, CEPH_ARGS, PYTHONPATH, ...
        self._environment = {"PATH": os.environ["PATH"], "CEPH_CONF": f"{directory}/ceph.conf"}
        self._host, self._port = host, free_port(host)
        self.endpoint_url = f"http://{host}:{self._port}"
        try:
            self._start_store(max_bytes)
            user = ("--uid=test", "--display-name=test", f"--access-key={key}")
            self._call("radosgw-admin", "user", "create", *user, f"--secret={secret}")
            self.start()
            self._create_bucket(key, secret, bucket)
        except BaseException:
            self.shut_down()
            raise

    def start(self) -> None:
        """Start the gateway and wait until it answers."""
        self._gateway = self._spawn("radosgw", "-f", "-n", "client.admin")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline and self._gateway.poll() is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=5)
            try:
                connection.request("GET", "/")
                connection.getresponse().read()
                return
            except OSError:
                time.sleep(0.02)
            finally:
                connection.close()
        raise AssertionError(f"the S3 gateway does not start:\n{self._output()}")

    def stop(self) -> None:
        """Kill -9 the gateway; what is stored stays."""
        self._gateway.kill()
        self._gateway.wait()

    def shut_down(self) -> None:
        """End all processes; what is stored is lost."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()
        self._starter.shutdown()

    def _start_store(self, max_bytes: int) -> None:
        fsid, monitor_port = str(uuid.uuid4()), free_port()
        config = _CONFIG.format(
            fsid=fsid,
            directory=self._directory,
            monitor_port=monitor_port,
            host=self._host,
            gateway_port=self._port,
            max_bytes=max_bytes,
        )
        (self._directory / "ceph.conf").write_text(config)
        key = self._call("ceph-authtool", "--gen-print-key").strip()
        (self._directory / "keyring").write_text(_KEYRING.format(key=key))
        (self._directory / "osd").mkdir()
        monitors = ("--fsid", fsid, "--addv", "a", f"[v2:127.0.0.1:{monitor_port}]", "monmap")
        self._call("monmaptool", "--create", *monitors)
        self._call("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap")
        self._spawn("ceph-mon", "-f", "-i", "a")
        self._call("ceph", "--connect-timeout", str(PATIENCE_SECONDS), "osd", "new", fsid)
        self._call("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", fsid)
        self._spawn("ceph-osd", "-f", "-i", "0")

    def _create_bucket(self, key: str, secret: str, name: str) -> None:
        client = botocore.session.Session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=key,
            aws_secret_access_key=secret,
        )
        client.create_bucket(Bucket=name)
        client.close()

    def _call(self, *command: str) -> str:
        try:
            return (
                self._starter.submit(
                    subprocess.run,
                    (*_DYING_WITH_US, *command),
                    cwd=self._directory,
                    env=self._environment,
                    timeout=PATIENCE_SECONDS,
                    check=True,
                    capture_output=True,
                    text=True,
                )
                .result()
                .stdout
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            raise AssertionError(f"{error}\n{error.stderr}\n{self._output()}") from error

    def _spawn(self, *command: str) -> subprocess.Popen[bytes]:
        with (self._directory / "output").open("ab") as output:
            process = self._starter.submit(
                subprocess.Popen,
                (*_DYING_WITH_US, *command),
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the tests; then they shut this down
            ).result()
        self._processes.append(process)
        return process

    def _output(self) -> str:
        path = self._directory / "output"
        return path.read_text(errors="replace")[-3000:] if path.exists() else ""
