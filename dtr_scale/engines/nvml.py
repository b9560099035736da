"""Read a GPU's energy counter from NVML, the library that comes with NVIDIA's driver."""

import ctypes
from contextlib import suppress

import torch

_LIBRARY = "libnvidia-ml.so.1"


class EnergyCounter:
    """The joules that a GPU has used since its driver was loaded.

    By ctypes: it is three calls, and the package that wraps them is not among the pinned ones.
    """

    def __init__(self, library: ctypes.CDLL, handle: ctypes.c_void_p) -> None:
        self._library = library
        self._handle = handle

    def read(self) -> float | None:
        """Return joules; None if the GPU does not tell them, as those before Volta."""
        millijoules = ctypes.c_ulonglong()
        status = self._library.nvmlDeviceGetTotalEnergyConsumption(
            self._handle, ctypes.byref(millijoules)
        )
        return None if status else millijoules.value / 1000


def open_energy_counter(device: torch.device) -> EnergyCounter | None:
    """Return the counter of a rank's GPU; None on a CPU, or where NVML is not at hand."""
    if device.type != "cuda":
        return None
    # By its id: CUDA numbers the visible GPUs, NVML all of them.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    handle = ctypes.c_void_p()
    with suppress(OSError, AttributeError):  # no such library, or one without these functions
        library = ctypes.CDLL(_LIBRARY)
        if not library.nvmlInit_v2() and not library.nvmlDeviceGetHandleByUUID(
            uuid.encode(), ctypes.byref(handle)
        ):
            counter = EnergyCounter(library, handle)
            return counter if counter.read() is not None else None
    return None
