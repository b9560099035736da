"""The container image: built by buildah, looked into, and run as an engine would run it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import files
from pathlib import Path

import pytest

from tests.support.image import DISK_BYTES, USER_ID, Image
from tests.support.runs import ROOT

SCRIPTS = Path(sysconfig.get_path("scripts"))
STAGES = ("base: Debian, in CI", "system: compilers, ssh", "train: Python's packages, dtr_scale")
LIMIT_BYTES = 8e9
pytestmark = pytest.mark.timeout(1200)  # the first test waits for the image
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
EXPERIMENT = (
    "--config=configs/demo_digits.json", "--data.type=synthetic", "--engine.precision=fp32",
    "--evaluation.every_steps=0", "--tracking.type=none", "--train.log_every=1",
)  # fmt: skip


def test_the_dockerfile_is_clean():
    subprocess.run([SCRIPTS / "hadolint", ROOT / "docker/Dockerfile"], check=True)


def test_the_shell_scripts_are_clean():
    scripts = [*ROOT.glob("docker/**/*.sh"), *ROOT.glob("launch/**/*.sh"), ROOT / ".ci/run"]
    scripts += ROOT.glob("launch/slurm/*.sbatch")
    assert len(scripts) > 4
    # SC1091: an environment's `activate` is not there yet.
    options = ("--shell=bash", "--exclude=SC1091")
    subprocess.run([SCRIPTS / "shellcheck", *options, *scripts], check=True, cwd=ROOT)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The image, built once; it and its containers are removed at the end."""
    folder = tmp_path_factory.mktemp("image")
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        pytest.skip(
            f"{free / 1e9:.0f} GB are free in {folder}, {DISK_BYTES / 1e9:.0f} GB are needed for "
            "the image; fix: set TMPDIR to a folder on a larger disk"
        )
    built = Image(folder)
    yield built
    built.remove()


def test_our_layers_fit_into_8_gb(image, capsys):
    layers = image.layers
    with capsys.disabled():
        print("\nthe image's layers, uncompressed:")
        for stage, layer in zip(STAGES, layers, strict=True):
            print(f"{layer.size / 1e9:9.3f} GB  {stage}")
    assert 1e9 < sum(layer.size for layer in layers[1:]) <= LIMIT_BYTES


def test_the_image_tells_an_engine_how_to_run_it(image):
    config = image.config
    assert config["User"] == str(USER_ID)
    assert set(config["Volumes"]) == {"/home/dtr", "/shared", "/tmp"}
    assert config["Entrypoint"] == ["/usr/bin/tini", "--", "entrypoint.sh"]
    assert config["Healthcheck"]["Test"] == ["CMD", "entrypoint.sh", "health"]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.base.name"].startswith("nvidia/cuda:")


# A private key as ssh and openssl write it, not the words in a program that reads one.
KEY = r"-----BEGIN ([A-Z]+ )*PRIVATE KEY-----\n[A-Za-z0-9+/=]{40}"
KEY_FILES = r"ssh_host_.*_key|id_(rsa|ecdsa|ed25519)|ssl-cert-snakeoil\.key"
LOGINS = r"\.netrc|\.pypirc|\.git-credentials|pip\.conf|uv\.toml|auth\.json|auth\.conf"
PACKAGE_INDEX = r"(index-url|://[^/@ ]+:[^/@ ]+@)"


def test_no_layer_holds_a_secret(image):
    """Neither keys and logins nor the settings by which this machine reaches a package index."""
    for layer in image.layers[1:]:
        names = [path.name for path in layer.folder.rglob("*")]
        assert len(names) > 1000
        found = [name for name in names if re.fullmatch(f"{KEY_FILES}|{LOGINS}", name)]
        assert not found
        searches = [(("-rlzPe", KEY), "."), (("-rlEe", PACKAGE_INDEX), "etc")]
        for options, below in searches:
            searched = subprocess.run(
                ["grep", *options, "--devices=skip", "--exclude=*.so*", below],
                cwd=layer.folder, env={"LC_ALL": "C"}, capture_output=True, text=True,
            )  # fmt: skip
            assert (searched.returncode, searched.stdout) == (1, ""), searched.stderr
    secretive = re.compile("KEY|TOKEN|SECRET|PASSWORD")
    assert not [pair for pair in image.config["Env"] if secretive.search(pair)]


def test_without_arguments_it_prints_the_help(image):
    run = image.run("entrypoint.sh")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: dtr-scale COMMAND")


def test_a_wrong_command_is_told_in_one_line(image):
    run = image.run("entrypoint.sh", "trian")
    assert run.returncode == 2
    assert "trian" in run.stderr


def test_it_runs_as_an_unprivileged_user_with_the_pinned_packages(image):
    assert image.run("id", "--user").stdout.strip() == str(USER_ID)
    script = "from importlib.metadata import distributions as d\n"
    script += "import json; print(json.dumps({p.name.lower(): p.version for p in d()}))"
    installed = json.loads(image.run("python", "-c", script).stdout)
    lines = (ROOT / "constraints.txt").read_text().lower().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pins = {name.replace("_", "-"): version for name, version in pins.items()}
    found = {name.replace("_", "-"): version for name, version in installed.items()}
    assert len(found) > 100
    assert {n: v for n, v in found.items() if pins.get(n) != v} == {"dtr-scale": "0.1.0"}


@pytest.fixture(scope="module")
def pytest_folder(tmp_path_factory):
    """This environment's pytest in a folder of its own, for an image that has none."""
    folder = tmp_path_factory.mktemp("pytest")
    folder.chmod(0o755)
    for name in (
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "execnet",
        "pluggy",
        "iniconfig",
        "pygments",
    ):
        for file in files(name) or []:
            if ".." not in file.parts and file.suffix != ".pyc":
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), folder / file)
    return folder


def test_the_config_tests_pass_in_it(image, pytest_folder):
    mounts = [f"{ROOT / name}:/opt/dtr_scale/{name}:ro" for name in ("tests", "pyproject.toml")]
    run = image.run(
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/config",
        mounts=[*mounts, f"{pytest_folder}:/pytest:ro"],
        environment={"PYTHONPATH": "/pytest:/opt/dtr_scale"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"\d{2,} passed", run.stdout)


def test_one_process_trains_two_steps(image):
    options = ("--engine.type=single", "--train.max_steps=2", "--run_dir=runs/single")
    run = image.run("entrypoint.sh", "train", *EXPERIMENT, *options)
    assert run.returncode == 0, run.stdout + run.stderr
    # runs/ of the image leads to the shared volume.
    run_dir = image.volumes / "shared/runs/single"
    assert json.loads((run_dir / "status.json").read_text())["outcome"] == "finished"
    assert len((run_dir / "journal.jsonl").read_text().splitlines()) == 2
    assert run_dir.stat().st_uid == USER_ID
    assert not (image.volumes / "tmp/dtr_scale.heartbeat").exists()


@pytest.fixture
def heartbeat(image):
    """The heartbeat's file, which is on a volume, as the image's user would write it."""
    path = image.volumes / "tmp/dtr_scale.heartbeat"
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.parametrize(("age_seconds", "code"), [(None, 0), (240, 0), (360, 1)])
def test_the_health_check_goes_by_the_heartbeat(image, heartbeat, age_seconds, code):
    if age_seconds is not None:
        heartbeat.touch()
        then = time.time() - age_seconds
        os.utime(heartbeat, (then, then))
    assert image.run("entrypoint.sh", "health").returncode == code


def test_a_dead_ssh_server_is_unhealthy(image):
    pid_file = image.volumes / "tmp/sshd.pid"
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    pid_file.write_text(f"{gone.pid}\n")
    assert image.run("entrypoint.sh", "health").returncode == 1
    pid_file.unlink()
    assert image.run("entrypoint.sh", "health").returncode == 0


def test_ranks_started_over_ssh_on_a_read_only_root_checkpoint_when_it_stops(image):
    """`docker run --read-only IMAGE sshd deepspeed --hostfile ...`, then `docker stop`.

    The one host is this container itself, by way of its ssh server, its keys and pdsh.
    """
    shared = image.volumes / "shared"
    (shared / "hostfile").write_text("127.0.0.1 slots=2\n")
    launcher = ("--hostfile=/shared/hostfile", "--force_multi", "--master_addr=127.0.0.1")
    options = ("--train.max_steps=100000", "--run_dir=runs/ssh", "--checkpoint.every_steps=50000")
    container = image.start_read_only(
        "sshd", "deepspeed", *launcher, "launch/train.py", *EXPERIMENT, *options, environment=CPU
    )
    run_dir = shared / "runs/ssh"
    first = None
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "journal.jsonl").exists():
            assert container.poll() is None, container.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        children = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text()
        first = int(children)
        refused = subprocess.run(
            ["nsenter", f"--target={first}", "--mount", "--pid", f"--root=/proc/{first}/root",
             "touch", "/opt/dtr_scale/x"], capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "Read-only file system" in refused.stderr
        os.kill(first, signal.SIGTERM)
        output, _ = container.communicate(timeout=90)
    except BaseException:
        container.kill()
        container.communicate()
        raise
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["outcome"], status["reason"]) == ("preempted", "SIGTERM"), output
    assert status["saved_step"] == status["step"] > 0
    assert container.returncode == 75, output
    # What nodes share by ssh was made here, for this user's eyes.
    assert (shared / "ssh/id").stat().st_mode & 0o777 == 0o600
