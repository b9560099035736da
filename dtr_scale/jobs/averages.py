"""Find the weights of a run that are asked for: an average that it keeps, or one made of them."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from dtr_scale.checkpoint.inspection import find_checkpoint, find_checkpoints, read_newest
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.config.changes import Change, changes
from dtr_scale.config.load import validate
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError, DamagedCheckpointError
from dtr_scale.train.reconstruction import StoredAverage, combine
from dtr_scale.train.run_dir import CONFIG

log = logging.getLogger(__name__)

_POWER = "ema_power_"


class Choice(NamedTuple):
    """Which weights of a run are wanted; the average that samples are drawn with by default.

    `ema` is the decay of an average that the run keeps ("0.9999", "power_0.05"), or "none" for the
    weights themselves; with `sigma_rel` a power-function average of that width is made of the
    stored ones. `step` is the checkpoint's, by default the newest whole one's.
    """

    ema: str | None = None
    sigma_rel: float | None = None
    step: int | None = None


class Averaged(NamedTuple):
    """An average's weights by our names, and the checkpoints that it stands at."""

    weights: dict[str, Tensor]
    average: str
    """The average in words."""
    records: list[list[dict[str, Any]] | None]
    """How each checkpoint's average was made; None for the weights themselves."""
    readers: tuple[CheckpointReader, ...]
    """Of one checkpoint, or of one per expert."""
    experiment: Experiment


def find_average(
    place: str, choice: Choice, storage_options: Mapping[str, Any] | None = None
) -> Averaged:
    """Return the weights of a run, a checkpoint.dir or one step_* folder that are asked for.

    Damaged checkpoints are named and passed over. Experts in `expert_*` below `place` come as one
    network. Raises ConfigError for an average or a step that is not there, and for experts that do
    not belong together; CheckpointError where no checkpoint is whole.
    """
    find = (
        partial(_stored, ema=choice.ema)
        if choice.sigma_rel is None
        else partial(_reconstructed, sigma_rel=choice.sigma_rel)
    )
    find = partial(find, step=choice.step, storage_options=storage_options)
    if experts := expert_dirs(Path(place)):
        return _assembled(place, [find(str(path)) for path in experts])
    return find(place)


def expert_dirs(run_dir: Path) -> list[Path]:
    """Return the runs of experts in a directory, in their order; [] where it holds none."""
    found = [path.parent for path in run_dir.glob(f"expert_*/{CONFIG}")]
    # By length first, so that expert_10 comes after expert_9.
    return sorted(found, key=lambda path: (len(path.name), path.name))


def check_alike(run_dir: Path | str, readers: Sequence[CheckpointReader]) -> None:
    """Raise ConfigError unless checkpoints are of all experts of one network, in their order.

    What makes two runs the same must be the same, but for the expert and what its intervals of
    the timesteps bring with them.
    """
    first, *others = readers
    model = first.meta["config"]["model"]
    numbers = [reader.meta["config"]["model"]["expert"] for reader in readers]
    if numbers != list(range(model["num_experts"])):
        raise ConfigError(
            f"{str(run_dir)!r} holds experts {numbers} of {model['num_experts']}; train the "
            "others with --model.expert=K"
        )
    for reader in others:
        found = changes(first.meta["config"], reader.meta["config"], source=first.url)
        # Performance settings may differ; the expert's number is what tells them apart.
        found = [c for c in found if c.identity and c.key != "model.expert"]
        hashes = [each.meta["manifest_hash"][:12] for each in (first, reader)]
        if hashes[0] != hashes[1]:
            before, after = (f"manifest {name}" for name in hashes)
            found.append(Change("data.shards", before, after))
        if found:
            raise ConfigError(
                f"{first.url} and {reader.url} are of different runs: "
                f"{', '.join(f'{c.key} = {c.before!r} and {c.after!r}' for c in found)}; train "
                "one of them again as the other was"
            )


def averages_of(reader: CheckpointReader) -> dict[str, list[dict[str, Any]]]:
    """Return how a checkpoint's averages were made, as `Ema.meta` tells it."""
    # Before checkpoints told, nothing but the experiment did.
    decay = reader.meta["config"]["train"]["ema_decay"]
    return reader.meta.get("averages", {"ema": [{"from_step": 0, "decay": decay}]})


def _stored(
    place: str, *, ema: str | None, step: int | None, storage_options: Mapping[str, Any] | None
) -> Averaged:
    """Return an average as the newest whole checkpoint holds it, or that of a step."""

    def read(reader: CheckpointReader) -> Averaged:
        kind = _kind(reader, ema)
        weights = _tensors(reader, kind) | _buffers(reader)
        record = None if kind == "master" else _history(reader, kind)
        return Averaged(weights, _in_words(record), [record], (reader,), _experiment(reader))

    return read_newest(place, read, step, storage_options)


def _reconstructed(
    place: str, *, sigma_rel: float, step: int | None, storage_options: Mapping[str, Any] | None
) -> Averaged:
    """Return a power-function average of any width, made of those in a run's kept checkpoints."""
    newest = find_checkpoint(place, step, storage_options)
    target = newest.meta["step"]
    stored = [
        (reader, key, average)
        for reader in _until(place, newest, storage_options)
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
    record = [{"sigma_rel": sigma_rel, "made_of": len(stored), "distance": round(distance, 6)}]
    weights_by_name = averaged | _buffers(newest)
    return Averaged(weights_by_name, average, [record], (newest,), _experiment(newest))


def _until(
    place: str, newest: CheckpointReader, storage_options: Mapping[str, Any] | None
) -> Iterator[CheckpointReader]:
    """Yield a run's whole checkpoints up to the newest; damaged ones are named and left out."""
    for checkpoint in find_checkpoints(place, storage_options):
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


def _history(reader: CheckpointReader, kind: str) -> list[dict[str, Any]]:
    return averages_of(reader).get(kind, [{"from_step": 0, "name": kind}])


def share_of_begin(history: list[dict[str, Any]] | None, step: int) -> float:
    """Return the weight that an average at `step` gives what the network began with.

    0 for the weights themselves and for power functions, which forget it at their first step.
    """
    if not history or any("decay" not in entry for entry in history):
        return 0.0
    ends = [*(entry["from_step"] for entry in history[1:]), step]
    parts = zip(history, ends, strict=True)
    return math.prod(entry["decay"] ** (end - entry["from_step"]) for entry, end in parts)


def _in_words(history: list[dict[str, Any]] | None) -> str:
    """Return an average as "decay 0.9, decay 0.99 from step 100"; "none" for the weights."""
    if history is None:
        return "none"
    parts = []
    for entry in history:
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


def _assembled(place: str, experts: list[Averaged]) -> Averaged:
    """Return experts as the one network that they are trained to be."""
    readers = tuple(reader for found in experts for reader in found.readers)
    check_alike(place, readers)
    # The names of `MultiExperts`.
    weights = {
        f"experts.{number}.{name}": value
        for number, found in enumerate(experts)
        for name, value in found.weights.items()
    }
    section = experts[0].experiment.model.model_copy(update={"expert": None})
    experiment = experts[0].experiment.model_copy(update={"model": section, "run_dir": place})
    records = [record for found in experts for record in found.records]
    return Averaged(weights, experts[0].average, records, readers, experiment)


def _experiment(reader: CheckpointReader) -> Experiment:
    return validate(reader.meta["config"], reader.url)
