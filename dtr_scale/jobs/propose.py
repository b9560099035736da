"""Propose an experiment for prepared data: network, batch and length that fit this machine."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dtr_scale.checkpoint.snapshot import available_memory
from dtr_scale.config.load import validate
from dtr_scale.config.schema import Experiment
from dtr_scale.data.manifest import Manifest, read_manifest
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.plan.cluster import Cluster
from dtr_scale.jobs.plan.gpus import GB, find_gpu
from dtr_scale.jobs.plan.planner import Planner
from dtr_scale.models.dit import VARIANTS, DiTSize
from dtr_scale.storage.folder import open_folder

# Up to how many samples a DiT of which size learns more than their copies, at which batch and for
# how many steps. The last is the paper's; larger ones are no better with DTR (configs/README.md).
_BY_SAMPLES = (
    (5_000, "S", 64, 20_000),
    (100_000, "B", 256, 100_000),
    (float("inf"), "L", 256, 400_000),
)
# Networks for a CPU: the largest that makes enough steps in the time, else the last.
_FOR_CPUS = (
    DiTSize(384, 12, 6, 2),
    DiTSize(256, 8, 4, 2),
    DiTSize(192, 6, 3, 2),
    DiTSize(128, 4, 4, 2),
)
_CPU_BATCH, _CPU_SECONDS = 32, 3600
_CPU_ENOUGH, _CPU_LEAST, _CPU_MOST = 5_000, 2_000, 10_000  # steps
# Forward and backward of these networks make 115 to 244 GFLOP/s on a core with AMX (measured, bf16,
# batch 32). Half of the least, for all that surrounds them; without bf16 a third of that (assumed).
_FLOPS_PER_CORE, _FLOPS_PER_FP32_CORE = 60e9, 20e9
_SIDE_TOKENS = 16  # per side of a sample, as DiT-*/2 has of a 256x256 picture's latents
_CPU_SIDE_TOKENS = 8
_STATE_BYTES = 24  # per parameter: fp32 weights, gradients, Adam's moments, average; bf16 weights
_LINE = 96  # characters of the file's lines
_ROOM = 0.8  # of the memory; the rest is for samples, their measures and what else runs here


class Machine(NamedTuple):
    """What a training on this machine has."""

    cores: int
    memory: int
    """Bytes, of one GPU where there is one."""
    gpu: str | None = None
    bf16: bool = True
    """Computes bf16 faster than fp32."""

    @property
    def told(self) -> str:
        """In words."""
        return self.gpu or f"{self.cores} CPU cores"


class Proposal(NamedTuple):
    """An experiment, and what it means here."""

    experiment: dict[str, Any]
    told: str

    @property
    def text(self) -> str:
        """The experiment's file: a line for each section, or two."""
        sections = (_lines(key, value) for key, value in self.experiment.items())
        return "{\n" + ",\n".join(sections) + "\n}\n"


def this_machine() -> Machine:
    """Return what this machine has: its first GPU, or its CPU."""
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        # Before Ampere bf16 is emulated.
        return Machine(cores, properties.total_memory, properties.name, properties.major >= 8)
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return Machine(cores, available_memory(), bf16="avx512_bf16" in flags or "amx_bf16" in flags)


def propose(data: str, out: Path, machine: Machine | None = None) -> Proposal:
    """Return an experiment on the data in `data`, named after the file that it will be in."""
    manifest = read_manifest(open_folder(data))
    machine = machine or this_machine()
    size, batch, max_steps = _scale(manifest, machine)
    num_samples, (channels, side, _) = manifest.num_samples("train"), manifest.shape
    shape = f"{side}x{side}x{channels}"
    raw: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", out.stem).strip("-._") or "mine",
        "description": f"{num_samples:,} samples of {shape}, for {machine.told}; by config init",
        "model": _model(manifest, size),
        "objective": {"type": "ant_uw"},
        "data": {"shards": data} | ({} if machine.gpu else {"num_workers": 1}),
        "train": {
            "max_steps": max_steps,
            "global_batch_size": batch,
            "micro_batch_size": batch,
            "lr": 1e-4 if machine.gpu else 5e-4,
            # An average over the last tenth of the steps, at most the paper's.
            "ema_decay": min(0.9999, round(1 - 10 / max_steps, 6)),
            "log_every": 100 if machine.gpu else 20,
        },
        "engine": {"precision": "bf16" if machine.bf16 else "fp32"},
        "checkpoint": {"every_steps": min(5_000, max_steps // 20)},
        "evaluation": _evaluation(manifest, machine, max_steps),
    }
    raw["train"]["micro_batch_size"] = _micro_batch(validate(raw, str(out)), machine)
    times = max_steps * batch / num_samples
    told = (
        f"{max_steps:,} steps of {batch} samples ({times:,.{0 if times >= 1 else 2}f} times all of "
        f"them) with DTR and ANT-UW, {size.depth} blocks of width {size.hidden_size}, patches of "
        f"{size.patch_size}x{size.patch_size}; {_time_told(size, manifest, max_steps, machine)}"
    )
    return Proposal(_without_defaults(raw, validate(raw, str(out))), told)


def write_proposal(proposal: Proposal, out: Path, *, force: bool) -> None:
    """Write the experiment's file; ConfigError where there is one and it is not to be replaced."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w" if force else "x", encoding="utf-8") as file:
            file.write(proposal.text)
    except FileExistsError:
        raise ConfigError(
            f"--out={out} is there already; give another name, or --force to replace it"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"--out={out} cannot be written: {error.strerror}; choose another place"
        ) from None


def _without_defaults(raw: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Return what an experiment's file has to say, and all of `train`: what one turns first."""
    needed = experiment.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    needed["train"] = raw["train"]
    return _among(raw, needed)


def _among(raw: dict[str, Any], needed: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _among(value, needed[key]) if isinstance(value, dict) else value
        for key, value in raw.items()
        if key in needed
    }


def _lines(key: str, value: Any) -> str:  # noqa: ANN401
    """Return a section as JSON, over several lines where one would be too long."""
    begin = f"  {json.dumps(key)}: "
    if not isinstance(value, dict):
        return begin + json.dumps(value)
    lines = [f"{begin}{{"]
    for name, setting in value.items():
        item = f"{json.dumps(name)}: {json.dumps(setting)}, "
        if len(lines[-1]) + len(item) > _LINE:
            lines.append(" " * (len(begin) + 1))
        lines[-1] += item
    return "\n".join(line.rstrip() for line in lines).removesuffix(",") + "}"


def _scale(manifest: Manifest, machine: Machine) -> tuple[DiTSize, int, int]:
    """Return the network, the batch and the number of steps."""
    if machine.gpu:
        return _scale_for_gpu(manifest, machine)
    patch = _patch_size(manifest.shape[1], _CPU_SIDE_TOKENS)
    sizes = [size._replace(patch_size=patch) for size in _FOR_CPUS]
    steps = {size: int(_CPU_SECONDS / _cpu_seconds(size, manifest, machine)) for size in sizes}
    size = next((size for size in sizes if steps[size] >= _CPU_ENOUGH), sizes[-1])
    max_steps = min(_CPU_MOST, max(_CPU_LEAST, steps[size] // 1000 * 1000))
    return size, _CPU_BATCH, max_steps


def _cpu_seconds(size: DiTSize, manifest: Manifest, machine: Machine) -> float:
    """Return the most that a step takes on these cores."""
    # Each weight's product is two operations, in the forward and twice in the backward.
    flops = 6 * _products(size) * (manifest.shape[1] // size.patch_size) ** 2 * _CPU_BATCH
    of_core = _FLOPS_PER_CORE if machine.bf16 else _FLOPS_PER_FP32_CORE
    return flops / of_core / machine.cores


def _time_told(size: DiTSize, manifest: Manifest, max_steps: int, machine: Machine) -> str:
    if machine.gpu:
        return f"for {machine.told}"
    minutes = max_steps * _cpu_seconds(size, manifest, machine) / 60
    return f"at most about {minutes:.0f} minutes on {machine.told}"


def _scale_for_gpu(manifest: Manifest, machine: Machine) -> tuple[DiTSize, int, int]:
    patch = _patch_size(manifest.shape[1], _SIDE_TOKENS)
    num_samples = manifest.num_samples("train")
    fitting = VARIANTS["DiT-S/2"], 64, 20_000
    for most, name, batch, steps in _BY_SAMPLES:
        size = VARIANTS[f"DiT-{name}/2"]
        if _STATE_BYTES * _weights(size) < _ROOM / 2 * machine.memory:
            fitting = size, batch, steps
        if num_samples <= most:
            break
    size, batch, steps = fitting
    return size._replace(patch_size=patch), batch, steps


def _micro_batch(experiment: Experiment, machine: Machine) -> int:
    """Return the most samples of one forward: the batch, or its half, fourth, ... that fits."""
    micro = experiment.train.global_batch_size
    if machine.gpu is None:
        return micro  # the networks for CPUs take a gigabyte at the most
    # Of the GPU that is planned for, its memory alone counts. Not compiled, as where the node
    # lacks a compiler: that takes more memory.
    engine = experiment.engine.model_copy(update={"compile": False})
    gpu = replace(find_gpu("a100-40gb"), memory_gb=_ROOM * machine.memory / GB)
    planner = Planner(experiment.model_copy(update={"engine": engine}), Cluster(gpu, gpus=1))
    most = max(1, planner.largest_micro_batch())
    while micro > most:
        micro //= 2
    return micro


def _weights(size: DiTSize) -> int:
    """Return about how many weights the blocks have: attention, MLP and modulation."""
    return 18 * size.hidden_size**2 * size.depth


def _products(size: DiTSize) -> int:
    """Return how many of them a token is multiplied by: not those of the modulation."""
    return 12 * size.hidden_size**2 * size.depth


def _patch_size(side: int, most_tokens: int) -> int:
    """Return the smallest patch that leaves at most so many tokens per side, or 8 at the most."""
    patches = [patch for patch in range(1, 9) if side % patch == 0]
    return next((patch for patch in patches if side // patch <= most_tokens), patches[-1])


def _conditioning(manifest: Manifest) -> str:
    if manifest.context_shape is not None:
        return "text"
    return "class" if manifest.num_classes > 1 else "none"


def _evaluation(manifest: Manifest, machine: Machine, max_steps: int) -> dict[str, Any]:
    return {
        "every_steps": max_steps // 5,
        "num_samples": 1000 if machine.gpu else 64,
        "cfg_scale": 1.0 if _conditioning(manifest) == "none" else 1.5,
        "sampler": "ddim",
        "num_sampling_steps": 50,
        "clip_denoised": manifest.encoding == "pixels",
    }


def _model(manifest: Manifest, size: DiTSize) -> dict[str, Any]:
    channels, side, _ = manifest.shape
    conditioning = _conditioning(manifest)
    names = {sizes: name for name, sizes in VARIANTS.items()}
    model: dict[str, Any] = {"type": "dit"}
    model |= {"variant": names[size]} if size in names else size._asdict()
    model |= {"in_channels": channels, "input_size": side, "conditioning": conditioning}
    if conditioning == "class":
        model["num_classes"] = manifest.num_classes
    if manifest.context_shape is not None:
        model["context_length"], model["context_dim"] = manifest.context_shape
    return model | {"routing": {"type": "dtr", "alpha": 4, "beta": 0.8}}
