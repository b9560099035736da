"""Shared fixtures, and which tests are left out where they cannot run."""

import itertools
import logging
import os
import re

import pytest

# Before torch is imported: bit-identical runs need the same number of threads everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before a hub's library is imported: nothing is fetched, and nobody waits for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

from dtr_scale.jobs.bench.hosts import connected_hosts
from dtr_scale.prepare.digits import prepare_digits
from dtr_scale.storage.folder import open_folder
from tests.support.browser import Browser
from tests.support.ceph import CephServer
from tests.support.faulty_proxy import FaultyProxy
from tests.support.processes import started_processes

# Fixtures that start servers of tests/debian-packages.txt: who uses one is marked `services`.
SERVICES = {"browser", "hosts", "image", "lab", "s3_server", "slurm"}
LARGE_GB = 26
SLOW_SECONDS, LARGE_SECONDS = 900, 3600  # others have the time limit of pyproject.toml
LEFT_OUT = pytest.StashKey[list[str]]()

# What launchers set, less what is set here. DeepSpeed sets it, too, in a process that trains.
LAUNCHED = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
} - set(os.environ)  # fmt: skip

KEY, SECRET, BUCKET = "testkey", "testsecret", "bucket"


def pytest_addoption(parser):
    parser.addoption("--leave-out-services", metavar="REASON", help="what the servers lack here")


def pytest_configure(config):
    """Hide GPUs from all tests but those of `-m gpu`: several ranks on one GPU are refused."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_xdist_auto_num_workers(config):
    """Run the quick tests side by side; all others in one process, since servers start once."""
    is_quick = all(f"not {marker}" in config.option.markexpr for marker in ("services", "slow"))
    return len(os.sched_getaffinity(0)) if is_quick else 0


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Mark what needs services; of what -m and -k select, leave out what cannot run here."""
    for item in items:
        if SERVICES.intersection(item.fixturenames):
            item.add_marker("services")
        is_large = item.get_closest_marker("large")
        if is_large:
            item.add_marker("slow")
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LARGE_SECONDS if is_large else SLOW_SECONDS))
    yield  # pytest's own selection, which the marks above are for
    reasons = {"services": config.getoption("leave_out_services")}
    memory_gb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if memory_gb < LARGE_GB:
        reasons["large"] = f"{LARGE_GB} GB of memory are needed, {memory_gb:.0f} GB are here"
    if not re.search(r"\bexhaustive\b", config.option.markexpr):
        reasons["exhaustive"] = "they take hours; -m exhaustive runs them"
    config.stash[LEFT_OUT] = []
    for marker, reason in reasons.items():
        left_out = [item for item in items if reason and item.get_closest_marker(marker)]
        if left_out:
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)
            config.stash[LEFT_OUT].append(f"left out {len(left_out)} {marker} tests: {reason}")


def pytest_unconfigure(config):
    """Tell in the last lines what was left out: a run without it has not tested all."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    for line in config.stash.get(LEFT_OUT, []) if reporter else []:
        reporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """The tests' own cache; the user's stays as it is."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_rank():
    """Let no test, and no process that it starts, take itself for a rank of an earlier one's."""
    for name in LAUNCHED:
        os.environ.pop(name, None)


@pytest.fixture
def popen():
    """A `Popen` whose processes are killed at the test's end, with all that they have started."""
    with started_processes() as start:
        yield start


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """Ceph's gateway; the AWS environment points at it, and holds nothing of the user's own."""
    with pytest.MonkeyPatch.context() as environment:
        for name in list(os.environ):
            if name.startswith("AWS_"):
                environment.delenv(name)
        environment.setenv("AWS_CONFIG_FILE", os.devnull)
        environment.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        environment.setenv("AWS_ACCESS_KEY_ID", KEY)
        environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        try:
            server = CephServer(tmp_path_factory.mktemp("s3"), KEY, SECRET, BUCKET)
        except FileNotFoundError as error:
            pytest.fail(str(error), pytrace=False)
        environment.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
        yield server
        server.shut_down()


@pytest.fixture(scope="module")
def hosts():
    """Two hosts that reach each other by ssh; a test that kills one boots it again."""
    with connected_hosts(2) as connected:
        yield connected


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium without a window."""
    return Browser(tmp_path_factory.mktemp("browser"))


@pytest.fixture
def s3_proxy(s3_server):
    """A proxy in front of the S3 server that loses, cuts, delays and counts as it is told."""
    with FaultyProxy(s3_server.endpoint_url) as proxy:
        yield proxy


_prefixes = itertools.count()


@pytest.fixture
def s3_url(s3_server):
    """An s3:// folder of its own; the AWS environment points at the server."""
    return f"s3://{BUCKET}/test-{next(_prefixes)}"


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.services)])
def folder(request, tmp_path):
    """An empty folder that does not exist yet, on disk and on S3."""
    if request.param == "local":
        return open_folder(tmp_path / "folder")
    return open_folder(request.getfixturevalue("s3_url"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits, prepared once in a local folder that no test writes to."""
    path = tmp_path_factory.mktemp("digits")
    prepare_digits(open_folder(path))
    return path


@pytest.fixture
def warnings_of(caplog):
    """Return the warnings of a module's logger, whatever the command line made of logging."""
    attached = []

    def messages(name):
        return [r.getMessage() for r in caplog.records if r.name == name and r.levelno >= 30]

    package = logging.getLogger("dtr_scale")
    if not package.propagate:
        package.addHandler(caplog.handler)
        attached.append(package)
    yield messages
    for logger in attached:
        logger.removeHandler(caplog.handler)
