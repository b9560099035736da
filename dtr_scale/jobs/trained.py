"""Load what a run has trained from its newest whole checkpoint, and draw samples from it."""

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dtr_scale.checkpoint.inspection import read_newest
from dtr_scale.checkpoint.reader import CheckpointReader
from dtr_scale.config.changes import Change, changes
from dtr_scale.config.load import load_experiment, parse_overrides
from dtr_scale.config.schema import Experiment
from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.sampling import draw_samples
from dtr_scale.jobs.build import build_network
from dtr_scale.jobs.sampling import sampling_conditions, sampling_settings
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.experts import MultiExperts
from dtr_scale.storage.folder import open_folder
from dtr_scale.train.run_dir import CONFIG
from dtr_scale.train.state import persistent_buffers


class TrainedRun(NamedTuple):
    """A run's experiment and its network with averaged weights, as its newest checkpoint has it."""

    experiment: Experiment
    network: Denoiser
    step: int
    readers: tuple[CheckpointReader, ...]
    """Of the checkpoints that were read: one, or one per expert."""

    @property
    def checkpoints(self) -> tuple[str, ...]:
        return tuple(reader.url for reader in self.readers)

    @property
    def averages(self) -> list[list[dict[str, Any]]]:
        """Since which step and with which decay each checkpoint's average was made."""
        return [averages_of(reader)["ema"] for reader in self.readers]

    @property
    def mask_step(self) -> int:
        """The step of the masks that were trained last, if they roam."""
        return max(self.step - 1, 0)


def load_run(run_dir: Path, overrides: Sequence[str] = ()) -> TrainedRun:
    """Return what a run has trained; experts in `expert_*` below `run_dir` come as one network.

    `overrides` may change the keys of evaluation, and data.storage_options, whose secrets no run
    keeps. A damaged checkpoint is named and the one before it taken, as in training. Raises
    ConfigError for other keys, where there is no run or no checkpoint, and for experts that do not
    belong together; CheckpointError where none is whole.
    """
    for key, _ in parse_overrides(overrides):
        if not f"{key}.".startswith(("evaluation.", "data.storage_options.")):
            raise ConfigError(
                f"--{key}: of a trained run evaluation.* alone can be overridden, for example "
                "--evaluation.cfg_scale=2 (and data.storage_options.*, which holds keys)"
            )
    if (run_dir / CONFIG).exists():
        run = _load_one(run_dir, overrides)
        if run.experiment.model.expert is None:
            return run
        raise ConfigError(
            f"{str(run_dir)!r} holds expert {run.experiment.model.expert} of "
            f"{run.experiment.model.num_experts}, which cannot sample alone; give {run_dir.parent}"
        )
    experts = [_load_one(path, overrides) for path in expert_dirs(run_dir)]
    if not experts:
        raise ConfigError(
            f"{str(run_dir)!r} is no run directory: it has no {CONFIG}; give the directory that "
            "`dtr-scale train` wrote, for example runs/demo_digits"
        )
    return _assembled(run_dir, experts)


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


def _assembled(run_dir: Path, experts: list[TrainedRun]) -> TrainedRun:
    readers = tuple(reader for run in experts for reader in run.readers)
    check_alike(run_dir, readers)
    experiment = experts[0].experiment
    network = MultiExperts([run.network for run in experts], experiment.diffusion.num_timesteps)
    return TrainedRun(experiment, network.eval(), min(run.step for run in experts), readers)


def _load_one(run_dir: Path, overrides: Sequence[str]) -> TrainedRun:
    # The directory may have been moved since the run wrote its own path down.
    experiment = load_experiment(run_dir / CONFIG, overrides)
    experiment = experiment.model_copy(update={"run_dir": str(run_dir)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = build_network(experiment)
    places = {name: f"ema/{name}" for name, _ in network.named_parameters()}
    places |= {name: f"buffer/{name}" for name in persistent_buffers(network)}

    def read(reader: CheckpointReader) -> TrainedRun:
        # Everything is read, and by that verified, before the network takes any of it: after a
        # damaged checkpoint `read_newest` tries the one before.
        stored = reader.read(places.values())
        network.load_state_dict({name: stored[key] for name, key in places.items()})
        return TrainedRun(experiment, network.to(device).eval(), reader.meta["step"], (reader,))

    return read_newest(str(run_dir), read, storage_options=experiment.data.storage_options)


def draw(run: TrainedRun, num_samples: int) -> Tensor:
    """Return samples 0 to `num_samples` of a run, as its experiment's evaluation draws them."""
    conditions, null_condition = sampling_conditions(run.experiment)
    return draw_samples(
        run.network,
        sampling_settings(run.experiment),
        range(num_samples),
        batch_size=run.experiment.evaluation.batch_size,
        conditions=conditions,
        null_condition=null_condition,
        step=run.mask_step,
        progress=lambda steps: tqdm(steps, desc="sampling", leave=False, disable=None),
    )


def check_output(path: Path, suffix: str) -> None:
    """Raise ConfigError before a long computation whose result could not be written.

    `suffix` is the ending of a file; "" stands for a folder.
    """
    if (suffix and path.suffix != suffix) or (path.is_dir() == bool(suffix) and path.exists()):
        wanted = f"a file that ends in {suffix}" if suffix else "a folder"
        raise ConfigError(f"--out={path} is not accepted; give {wanted}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # leaves nothing, however this ends
    except OSError as error:
        raise ConfigError(
            f"--out={path} cannot be written: {error.strerror}; choose another place"
        ) from None


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: an interruption leaves what was there before."""
    content = io.BytesIO()
    write(content)
    open_folder(path.parent).write_bytes(path.name, content.getbuffer())
