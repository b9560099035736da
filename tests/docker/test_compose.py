"""What docker/compose.yaml says, as Docker Compose itself reads it."""

import re

import pytest

from tests.support.compose import COMPOSE, DOCKERFILE, read_compose
from tests.support.runs import ROOT

GPU = COMPOSE.with_name("compose.gpu.yaml")
SERVICES = read_compose(COMPOSE)["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_no_more_than_it_needs(name):
    """A read-only root, no capabilities, and no secret where `docker inspect` shows it."""
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "devices", "user"} & set(service)
    for key, value in service.get("environment", {}).items():
        assert not re.search("PASSWORD|SECRET|TOKEN|ACCESS_KEY", key), key
        assert not re.search("://[^/@]*:[^/@]*@", value), key


def test_what_all_services_trust_is_written_by_one():
    """Whoever may write there may name another authority, or another key."""
    for volume in ("trust", "access"):
        writers = [
            name
            for name, service in SERVICES.items()
            for mount in service.get("volumes", [])
            if mount["source"] == volume and not mount.get("read_only")
        ]
        assert writers == ["secrets"], volume


def test_what_writes_has_time_to_end_well():
    """A checkpoint, or a database; Docker's own 10 seconds are too short."""
    times = {name: service.get("stop_grace_period") for name, service in SERVICES.items()}
    nodes, servers = ("node-1", "node-2"), ("mlflow", "postgres", "s3")
    expected = dict.fromkeys(nodes, "2m0s") | dict.fromkeys(servers, "30s")
    assert {name: time for name, time in times.items() if time} == expected


def test_a_node_may_hold_what_its_network_reads_and_its_ranks_share():
    """RDMA locks pages, and NCCL and data workers pass on what is in /dev/shm."""
    for node in ("node-1", "node-2"):
        assert SERVICES[node]["ulimits"] == {"memlock": -1}
        assert int(SERVICES[node]["shm_size"]) >= 2**31


def test_only_mlflow_can_be_reached_and_only_from_this_machine():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"mlflow"}
    assert [port["host_ip"] for port in published["mlflow"]] == ["127.0.0.1"]


def test_what_others_wait_for_tells_when_it_is_ready():
    for name, service in SERVICES.items():
        for needed, how in service.get("depends_on", {}).items():
            waited = SERVICES[needed]
            if how["condition"] == "service_healthy":
                assert {"test", "interval", "timeout", "retries"} <= set(waited["healthcheck"])
                assert waited["restart"] == "unless-stopped", needed
            else:
                assert how["condition"] == "service_completed_successfully", (name, needed)
                assert waited.get("restart") != "unless-stopped", needed


def test_the_image_has_a_folder_for_each_volume():
    """Docker gives a new volume to the owner of that folder in the image, or else to root."""
    (made,) = re.findall(
        r"install --directory --owner dtr --group dtr \\\n +(/lab/.*)", DOCKERFILE.read_text()
    )
    mounted = {
        volume["target"] for service in SERVICES.values() for volume in service.get("volumes", [])
    }
    assert mounted == {*made.split(), "/shared"}


def test_each_node_has_a_gpu_of_its_own():
    nodes = {
        name: service
        for name, service in read_compose(COMPOSE, GPU)["services"].items()
        if name.startswith("node-")
    }
    slots = (ROOT / "docker" / "lab" / "hostfile").read_text().split("\n")
    assert [line for line in slots if line] == [f"{name} slots=1" for name in sorted(nodes)]
    gpus = []
    for node in nodes.values():
        assert node["environment"]["DS_ACCELERATOR"] == "cuda"
        (device,) = node["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        gpus += device["device_ids"]
    assert sorted(gpus) == ["0", "1"]
