"""Averaged weights out of a run's checkpoints, as a file of weights."""

from pathlib import Path

from torch import Tensor

from dtr_scale.checkpoint.convert import convert_network
from dtr_scale.checkpoint.inspection import complete_checkpoints, find_checkpoint
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.config.load import validate
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError
from dtr_scale.train.ema import PowerFunction, combination


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
    newest = readers[0]
    experiment = validate(newest.meta["config"], newest.url)
    if not experiment.train.ema_sigma_rel:
        raise ConfigError(
            f"{place} was trained without train.ema_sigma_rel, so nothing can be reconstructed; "
            "train with --train.ema_sigma_rel=[0.05,0.1]"
        )
    target = newest.meta["step"] if step is None else step
    readers = [reader for reader in readers if reader.meta["step"] <= target]
    if not readers or readers[0].meta["step"] != target:
        raise ConfigError(f"--step={target}: {place} has no complete checkpoint of that step")
    stored = [
        (reader, PowerFunction(sigma))
        for reader in readers
        for sigma in experiment.train.ema_sigma_rel
    ]
    weights, distance = combination(
        [(reader.meta["step"], profile.sigma_rel) for reader, profile in stored], target, sigma_rel
    )
    total: dict[str, Tensor] = {}
    for (reader, profile), weight in zip(stored, weights.tolist(), strict=True):
        for name, value in _tensors(reader, profile.key).items():
            part = value.double() * weight
            total[name] = total[name] + part if name in total else part
    _write(experiment, {name: value.float() for name, value in total.items()}, newest, out)
    return len(stored), distance


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
