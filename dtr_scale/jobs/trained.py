"""Load what a run has trained, on one rank or on several, and write what is made of it."""

import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from dtr_scale.config.load import load_experiment, parse_overrides
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError
from dtr_scale.jobs.averages import Choice, expert_dirs, find_average
from dtr_scale.jobs.build import build_network
from dtr_scale.logs import telling
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.storage.folder import open_folder
from dtr_scale.train.run_dir import CONFIG

_QUIET_SECONDS = 2.0


class TrainedRun(NamedTuple):
    """A run's experiment and its network, by default with averaged weights, as a checkpoint has it.

    Experts come as one network.
    """

    experiment: Experiment
    network: Denoiser
    step: int
    checkpoints: tuple[str, ...]
    """Those that were read: one, or one per expert."""
    averages: list[list[dict[str, Any]] | None]
    """Since which step and with which decay each checkpoint's average was made; None for none."""

    @property
    def mask_step(self) -> int:
        """The step of the masks that were trained last, if they roam."""
        return max(self.step - 1, 0)


def load_run(
    run_dir: Path,
    overrides: Sequence[str] = (),
    choice: Choice | None = None,
    world: World | None = None,
) -> TrainedRun:
    """Return what a run has trained; experts in `expert_*` below `run_dir` come as one network.

    `overrides` may change the keys of evaluation, and data.storage_options, whose secrets no run
    keeps. A damaged checkpoint is named and the one before it taken, as in training. Of several
    ranks in `world` the first reads, and the others are given what it has read. Raises ConfigError
    for other keys, where there is no run or no checkpoint, and for experts that do not belong
    together; CheckpointError where none is whole.
    """
    world = world or World(0, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    run: TrainedRun | None = None
    with world.agree():
        if world.is_main:
            with telling(f"loading the network of {run_dir}", _QUIET_SECONDS):
                run = _read_run(run_dir, overrides, choice or Choice())
                run.network.to(world.device).eval()
    if world.world_size == 1:
        assert run
        return run
    # Not read by each rank: a training that goes on may have a newer checkpoint for the next one.
    told = world.broadcast_object(run._replace(network=None) if run else None)
    network = run.network if run else build_network(told.experiment).to(world.device).eval()
    for tensor in network.state_dict().values():
        world.broadcast(tensor)
    return told._replace(network=network)


def _read_run(run_dir: Path, overrides: Sequence[str], choice: Choice) -> TrainedRun:
    for key, _ in parse_overrides(overrides):
        if not f"{key}.".startswith(("evaluation.", "data.storage_options.")):
            raise ConfigError(
                f"--{key}: of a trained run evaluation.* alone can be overridden, for example "
                "--evaluation.cfg_scale=2 (and data.storage_options.*, which holds keys)"
            )
    experiment = _experiment(run_dir, overrides)
    found = find_average(str(run_dir), choice, experiment.data.storage_options)
    network = build_network(experiment)
    network.load_state_dict(found.weights)
    return TrainedRun(
        experiment,
        network,
        min(reader.meta["step"] for reader in found.readers),
        tuple(reader.url for reader in found.readers),
        found.records,
    )


def _experiment(run_dir: Path, overrides: Sequence[str]) -> Experiment:
    if (run_dir / CONFIG).exists():
        experiment = load_experiment(run_dir / CONFIG, overrides)
        if experiment.model.expert is not None:
            raise ConfigError(
                f"{str(run_dir)!r} holds expert {experiment.model.expert} of "
                f"{experiment.model.num_experts}, which cannot sample alone; give {run_dir.parent}"
            )
    elif experts := expert_dirs(run_dir):
        experiment = load_experiment(experts[0] / CONFIG, overrides)
        together = experiment.model.model_copy(update={"expert": None})
        experiment = experiment.model_copy(update={"model": together})
    else:
        raise ConfigError(
            f"{str(run_dir)!r} is no run directory: it has no {CONFIG}; give the directory that "
            "`dtr-scale train` wrote, for example runs/demo_digits"
        )
    # The directory may have been moved since the run wrote its own path down.
    return experiment.model_copy(update={"run_dir": str(run_dir)})


def check_output(path: Path, suffix: str, option: str = "--out") -> None:
    """Raise ConfigError before a long computation whose result could not be written.

    `suffix` is the ending of a file; "" stands for a folder. `option` is what gave the path.
    """
    if (suffix and path.suffix != suffix) or (path.is_dir() == bool(suffix) and path.exists()):
        wanted = f"a file that ends in {suffix}" if suffix else "a folder"
        raise ConfigError(f"{option}={path} is not accepted; give {wanted}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # leaves nothing, however this ends
    except OSError as error:
        raise ConfigError(
            f"{option}={path} cannot be written: {error.strerror}; choose another place"
        ) from None


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all: an interruption leaves what was there before."""
    content = io.BytesIO()
    write(content)
    open_folder(path.parent).write_bytes(path.name, content.getbuffer())
