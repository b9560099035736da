"""Averaged weights out of a run's checkpoints, as a file of weights."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from dtr_scale.checkpoint.convert import convert_network
from dtr_scale.checkpoint.inspection import complete_checkpoints, find_checkpoint
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.config.load import validate
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError
from dtr_scale.train.reconstruction import StoredAverage, combine

_POWER = "ema_power_"


def export_checkpoint(place: str, ema: str, out: Path) -> None:
    """Write the weights of a checkpoint as safetensors in DiT's layout, where the network has one.

    `ema` is an average's decay as the experiment has it ("0.9999", "power_0.05"), or "none" for the
    weights themselves. Raises ConfigError for an average that is not there.
    """
    reader = find_checkpoint(place)
    experiment = validate(reader.meta["config"], reader.url)
    _write(experiment, _tensors(reader, _kind(reader, experiment, ema)), reader, out)


def reconstruct_run(
    place: str, sigma_rel: float, out: Path, step: int | None = None
) -> tuple[int, float]:
    """Write a power-function average of any width, made of those in a run's kept checkpoints.

    `step` is the checkpoint it stands at, the newest by default. Returns how many averages went in,
    and the relative distance of the profile reached (see `combination`).
    """
    readers = list(complete_checkpoints(place))
    target = readers[0].meta["step"] if step is None else step
    readers = [reader for reader in readers if reader.meta["step"] <= target]
    if not readers or readers[0].meta["step"] != target:
        raise ConfigError(f"--step={target}: {place} has no complete checkpoint of that step")
    stored = [
        (reader, key, average) for reader in readers for key, average in _power_functions(reader)
    ]
    if not stored:
        raise ConfigError(
            f"{place} was trained without train.ema_sigma_rel, so nothing can be reconstructed; "
            "train with --train.ema_sigma_rel=[0.05,0.1]"
        )
    weights, distance = combine([average for _, _, average in stored], target, sigma_rel)
    total: dict[str, Tensor] = {}
    for (reader, key, _), weight in zip(stored, weights.tolist(), strict=True):
        for name, value in _tensors(reader, key).items():
            part = value.double() * weight
            total[name] = total[name] + part if name in total else part
    experiment = validate(readers[0].meta["config"], readers[0].url)
    _write(experiment, {name: value.float() for name, value in total.items()}, readers[0], out)
    return len(stored), distance


def _power_functions(reader: CheckpointReader) -> Iterator[tuple[str, StoredAverage]]:
    """Yield the power-function averages that a checkpoint really holds, by key.

    Its experiment tells what the run keeps now, not what it kept then.
    """
    for key in dict.fromkeys(key.partition("/")[0] for key in reader.shapes):
        if key.startswith(_POWER):
            history = reader.meta.get("averages", {}).get(key, [{"from_step": 0}])
            sigma_rel = float(history[0].get("sigma_rel", key.removeprefix(_POWER)))
            yield key, StoredAverage(reader.meta["step"], sigma_rel, history[0]["from_step"])


def _kind(reader: CheckpointReader, experiment: Experiment, ema: str) -> str:
    kinds = {key.partition("/")[0] for key in reader.shapes}
    first = f"{experiment.train.ema_decay:g}"
    kind = {"none": "master", first: "ema", "ema": "ema"}.get(ema, f"ema_{ema}")
    if kind not in kinds:
        others = sorted(name.removeprefix("ema_") for name in kinds if name.startswith("ema_"))
        accepted = ", ".join([first, *others, "none"])
        raise ConfigError(f"--ema={ema}: {reader.url} has no such average; accepted: {accepted}")
    return kind


def _tensors(reader: CheckpointReader, kind: str) -> dict[str, Tensor]:
    keys = [key for key in reader.shapes if key.startswith(f"{kind}/")]
    return {key.partition("/")[2]: value for key, value in reader.read(keys).items()}


def _write(
    experiment: Experiment, weights: dict[str, Tensor], reader: CheckpointReader, out: Path
) -> None:
    buffers = {name: value.bool() for name, value in _tensors(reader, "buffer").items()}
    convert_network(
        weights | buffers,
        experiment.model.model_dump(exclude_none=True),
        "safetensors",
        out,
        experiment.diffusion.num_timesteps,
    )
