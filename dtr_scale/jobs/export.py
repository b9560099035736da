"""Write averaged weights of a run, or official ones, as a file or for diffusers."""

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor

from dtr_scale.checkpoint.convert import Kind, from_official, official_config, unwrapped
from dtr_scale.checkpoint.export import export_diffusers, export_dit
from dtr_scale.checkpoint.inspection import find_checkpoint, find_checkpoints, read_newest
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.checkpoint.weights import read_weights, write_safetensors
from dtr_scale.config.load import resolved, validate
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError, DamagedCheckpointError
from dtr_scale.jobs.trained import averages_of, check_alike, check_output, expert_dirs
from dtr_scale.train.reconstruction import StoredAverage, combine

log = logging.getLogger(__name__)

Target = Literal["safetensors", "diffusers", "official"]

_POWER = "ema_power_"


class _Averaged(NamedTuple):
    """An average's weights by our names, and the checkpoint that it stands at."""

    weights: dict[str, Tensor]
    average: str
    reader: CheckpointReader
    experiment: Experiment


def export_run(
    place: str,
    target: Target,
    out: Path,
    *,
    ema: str | None = None,
    sigma_rel: float | None = None,
    step: int | None = None,
) -> str:
    """Write an average of a run's weights, and return it in words.

    `ema` is the decay of an average that the run keeps ("0.9999", "power_0.05"; by default the one
    that samples are drawn with), or "none" for the weights themselves; with `sigma_rel` a
    power-function average of that width is made of the stored ones. `step` is the checkpoint's, by
    default the newest whole one's: damaged ones are named and passed over.

    "safetensors" has our names, for the network of `build_model(model, num_timesteps)` of the
    config in the file's header; "official" has those of DiT or DTR, and "diffusers" is a folder.
    Raises ConfigError for an average or a step that is not there, and for a network that the
    target cannot hold.
    """
    check_output(out, "" if target == "diffusers" else ".safetensors")
    choose = (
        partial(_stored, ema=ema)
        if sigma_rel is None
        else partial(_reconstructed, sigma_rel=sigma_rel)
    )
    if experts := expert_dirs(Path(place)):
        found = _assembled(place, [choose(str(path), step=step) for path in experts])
    else:
        found = choose(place, step=step)
    model = found.experiment.model.model_dump(exclude_none=True)
    header = _header(found)
    match target:
        case "safetensors":
            write_safetensors(found.weights, out, header)
        case "official":
            num_timesteps = found.experiment.diffusion.num_timesteps
            export_dit(found.weights, model, out, num_timesteps, header)
        case "diffusers":
            export_diffusers(found.weights, model, out, header)
    return found.average


def convert_file(
    source: Path,
    kind: Kind,
    target: Literal["safetensors", "diffusers"],
    out: Path,
    num_heads: int | None = None,
) -> None:
    """Convert a file of official weights, the averaged ones if it has any.

    "safetensors" writes the file `out` with the official names and masks, in fp32, "diffusers" the
    folder `out`. Errors: those of `read_weights`, `from_official` and `export_diffusers`.
    """
    check_output(out, "" if target == "diffusers" else ".safetensors")
    official = read_weights(source)
    weights = from_official(official, kind)
    if target == "safetensors":
        write_safetensors(unwrapped(official), out)
    else:
        config = {"type": "adm"} if kind == "adm" else official_config(official, kind, num_heads)
        export_diffusers(weights, config, out)


def _stored(place: str, *, ema: str | None, step: int | None) -> _Averaged:
    """Return an average as the newest whole checkpoint holds it, or that of a step."""

    def read(reader: CheckpointReader) -> _Averaged:
        kind = _kind(reader, ema)
        weights = _tensors(reader, kind) | _buffers(reader)
        return _Averaged(weights, _in_words(reader, kind), reader, _experiment(reader))

    return read_newest(place, read, step)


def _reconstructed(place: str, *, sigma_rel: float, step: int | None) -> _Averaged:
    """Return a power-function average of any width, made of those in a run's kept checkpoints."""
    newest = find_checkpoint(place, step)
    target = newest.meta["step"]
    stored = [
        (reader, key, average)
        for reader in _until(place, newest)
        for key, average in _power_functions(reader)
    ]
    if not stored:
        raise ConfigError(
            f"{place} was trained without train.ema_sigma_rel, so nothing can be reconstructed; "
            "train with --train.ema_sigma_rel=[0.05,0.1]"
        )
    weights, distance = combine([average for _, _, average in stored], target, sigma_rel)
    # One stored average is in memory at a time. The sum is float64 and rounded once, at its end.
    total: dict[str, Tensor] = {}
    for (reader, key, _), weight in zip(stored, weights.tolist(), strict=True):
        for name, value in _tensors(reader, key).items():
            part = value.double() * weight
            total[name] = total[name] + part if name in total else part
    average = (
        f"sigma_rel {sigma_rel:g}, made of {len(stored)} averages; its profile is {distance:.1%} "
        "from the one asked for"
    )
    averaged = {name: value.float() for name, value in total.items()}
    return _Averaged(averaged | _buffers(newest), average, newest, _experiment(newest))


def _until(place: str, newest: CheckpointReader) -> Iterator[CheckpointReader]:
    """Yield a run's whole checkpoints up to the newest; damaged ones are named and left out."""
    for checkpoint in find_checkpoints(place):
        if checkpoint.step is not None and checkpoint.step > newest.meta["step"]:
            continue
        try:
            reader = checkpoint.open()
            reader.check_sizes()
            yield reader
        except DamagedCheckpointError as error:
            log.warning("checkpoint passed over: %s", error)


def _power_functions(reader: CheckpointReader) -> Iterator[tuple[str, StoredAverage]]:
    """Yield the power-function averages that a checkpoint really holds, by key.

    Its experiment tells what the run keeps now, not what it kept then.
    """
    for key in _kinds(reader):
        if key.startswith(_POWER):
            # Where a checkpoint tells nothing of an average, it was made from the first step on.
            history = averages_of(reader).get(key, [{"from_step": 0}])
            sigma_rel = float(history[0].get("sigma_rel", key.removeprefix(_POWER)))
            yield key, StoredAverage(reader.meta["step"], sigma_rel, history[0]["from_step"])


def _kind(reader: CheckpointReader, ema: str | None) -> str:
    kinds = _kinds(reader)
    first = f"{reader.meta['config']['train']['ema_decay']:g}"
    # Checkpoints keep the average of train.ema_decay as "ema", others as "ema_" and their name.
    kind = {None: "ema", "none": "master", first: "ema"}.get(ema, f"ema_{ema}")
    if kind not in kinds:
        others = sorted(name.removeprefix("ema_") for name in kinds if name.startswith("ema_"))
        accepted = ", ".join([first, *others, "none"])
        raise ConfigError(f"--ema={ema}: {reader.url} has no such average; accepted: {accepted}")
    return kind


def _in_words(reader: CheckpointReader, kind: str) -> str:
    """Return an average as "decay 0.9, decay 0.99 from step 100"; "none" for the weights."""
    if kind == "master":
        return "none"
    parts = []
    for entry in averages_of(reader).get(kind, [{"from_step": 0, "name": kind}]):
        told = " ".join(f"{k} {v}" for k, v in entry.items() if k != "from_step")
        parts.append(told + (f" from step {entry['from_step']}" if entry["from_step"] else ""))
    return ", ".join(parts)


def _kinds(reader: CheckpointReader) -> list[str]:
    return list(dict.fromkeys(key.partition("/")[0] for key in reader.shapes))


def _tensors(reader: CheckpointReader, kind: str) -> dict[str, Tensor]:
    keys = [key for key in reader.shapes if key.startswith(f"{kind}/")]
    return {key.partition("/")[2]: value for key, value in reader.read(keys).items()}


def _buffers(reader: CheckpointReader) -> dict[str, Tensor]:
    """Return the masks of a network with masks of its own, bool."""
    # Checkpoints hold fp32 alone, masks too.
    return {name: value.bool() for name, value in _tensors(reader, "buffer").items()}


def _assembled(place: str, experts: list[_Averaged]) -> _Averaged:
    """Return experts as the one network that they are trained to be."""
    check_alike(place, [found.reader for found in experts])
    # The names of `MultiExperts`.
    weights = {
        f"experts.{number}.{name}": value
        for number, found in enumerate(experts)
        for name, value in found.weights.items()
    }
    section = experts[0].experiment.model.model_copy(update={"expert": None})
    experiment = experts[0].experiment.model_copy(update={"model": section, "run_dir": place})
    return experts[0]._replace(weights=weights, experiment=experiment)


def _experiment(reader: CheckpointReader) -> Experiment:
    return validate(reader.meta["config"], reader.url)


def _header(found: _Averaged) -> dict[str, str]:
    """Return what a file of weights says of itself, as safetensors' metadata."""
    meta, config = found.reader.meta, resolved(found.experiment)
    return {
        "config": json.dumps(config),
        "step": str(meta["step"]),
        "average": found.average,
        "run": config["run_dir"],
        "checkpoint": found.reader.url,
        "dtr_scale": meta["version"],
    }
