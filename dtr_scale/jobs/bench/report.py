"""Write what a benchmark has measured as JSON, and compare it with an earlier one."""

import json
import os
import platform
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import dtr_scale
from dtr_scale.config.changes import flatten
from dtr_scale.config.load import resolved
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.drawing import device_name
from dtr_scale.jobs.trained import write_whole

_NOT_COMPARED = ("$schema", "name", "description", "expected", "run_dir")


def machine(world: World) -> dict[str, Any]:
    """Return where a benchmark ran, as far as its figures depend on it."""
    return {
        "device": device_name(world.device),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "ranks": world.world_size,
        "torch": torch.__version__,
        "dtr_scale": dtr_scale.__version__,
    }


def config(experiment: Experiment) -> dict[str, Any]:
    """Return the settings that were measured, flat; not the names, which change nothing."""
    flat = flatten(resolved(experiment))
    return {key: value for key, value in flat.items() if key.split(".")[0] not in _NOT_COMPARED}


def memory_peak_bytes(world: World) -> int:
    """Return the most memory that any rank has used: of its GPU, or without one of its process."""
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return max(world.all_gather_object(peak))


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    write_whole(path, lambda file: file.write(json.dumps(report, indent=2).encode() + b"\n"))


def read_report(path: Path, bench: str, option: str = "--compare") -> dict[str, Any]:
    """Return an earlier benchmark's report, the file of `option`; ConfigError if it is none."""
    try:
        report = json.loads(path.read_bytes())
        found = report["bench"]
    except OSError as error:
        raise ConfigError(f"{option}={path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"{option}={path} is no report of a benchmark; give what --json has written"
        ) from None
    if found != bench:
        raise ConfigError(
            f"{option}={path} is of `dtr-scale bench {found}`; give one of `bench {bench}`"
        )
    return report


def compared(now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a comparison: ratios of the figures, and what else is not the same."""
    for key, value in now.items():
        old = before.get(key)
        if isinstance(value, float) and isinstance(old, float) and old:
            yield f"{key:34}{old:12.4g} -> {value:10.4g}{value / old:8.3f}x"
    for section in ("machine", "config"):
        new, old = now[section], before.get(section, {})
        for key in sorted(new.keys() | old.keys()):
            if new.get(key) != old.get(key):
                yield f"not the same: {section}'s {key} was {old.get(key)}, is {new.get(key)}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
