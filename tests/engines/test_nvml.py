"""NVML's energy counter, from a library that answers as the driver's does."""

import ctypes.util
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

from dtr_scale.engines import nvml

SOURCE = """
#include <string.h>
static int handle, is_open;
int nvmlInit_v2(void) { is_open = 1; return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = &handle;
    return !is_open || strcmp(uuid, "GPU-of-this-rank") ? 2 : 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) {
    if (device != &handle || OLD) return 3;
    *millijoules = 12345678901234ULL;
    return 0;
}
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    uuid = SimpleNamespace(uuid="of-this-rank")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: uuid)

    def build(old: int) -> str:
        path = tmp_path / f"nvml{old}.so"
        command = ["gcc", "-shared", "-fPIC", f"-DOLD={old}", "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=SOURCE.encode(), check=True)
        return str(path)

    return build


def test_joules_are_read_of_the_ranks_own_gpu(library, monkeypatch):
    monkeypatch.setattr(nvml, "_LIBRARY", library(0))
    counter = nvml.open_energy_counter(torch.device("cuda", 0))
    assert counter and counter.read() == 12345678901.234


def test_there_is_no_counter_where_it_cannot_be_read(library, monkeypatch):
    monkeypatch.setattr(nvml, "_LIBRARY", library(1))  # a GPU before Volta
    assert nvml.open_energy_counter(torch.device("cuda", 0)) is None
    monkeypatch.setattr(nvml, "_LIBRARY", "libno-such.so.1")
    assert nvml.open_energy_counter(torch.device("cuda", 0)) is None
    monkeypatch.setattr(nvml, "_LIBRARY", ctypes.util.find_library("c"))  # without its functions
    assert nvml.open_energy_counter(torch.device("cuda", 0)) is None
    assert nvml.open_energy_counter(torch.device("cpu")) is None
