"""Tell how a run's device is doing."""

import resource

import torch


def memory_gb() -> float:
    """Return the most memory in use so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
