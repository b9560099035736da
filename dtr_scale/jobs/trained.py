"""Load what a run has trained from its newest complete checkpoint, and draw samples from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dtr_scale.config.load import load_experiment, parse_overrides
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.sampling import draw_samples
from dtr_scale.jobs.build import (
    build_network,
    open_checkpoints,
    sampling_conditions,
    sampling_settings,
)
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.experts import MultiExperts
from dtr_scale.train.run_dir import CONFIG
from dtr_scale.train.state import persistent_buffers


class TrainedRun(NamedTuple):
    """A run's experiment and its network with averaged weights, as its newest checkpoint has it."""

    experiment: Experiment
    network: Denoiser
    step: int
    checkpoints: tuple[str, ...]
    """Where they were read: one, or one per expert."""

    @property
    def mask_step(self) -> int:
        """The step of the masks that were trained last, if they roam."""
        return max(self.step - 1, 0)


def load_run(run_dir: Path, overrides: Sequence[str] = ()) -> TrainedRun:
    """Return what a run has trained; experts in `expert_*` below `run_dir` come as one network.

    `overrides` may change the keys of evaluation. Raises ConfigError for others, and where there is
    no run; CheckpointError where there is no checkpoint.
    """
    for key, _ in parse_overrides(overrides):
        if not key.startswith("evaluation."):
            raise ConfigError(
                f"unknown argument --{key}; of a trained run evaluation.* alone can be overridden, "
                "for example --evaluation.cfg_scale=2"
            )
    if (run_dir / CONFIG).exists():
        run = _load_one(run_dir, overrides)
        if run.experiment.model.expert is None:
            return run
        raise ConfigError(
            f"{str(run_dir)!r} holds expert {run.experiment.model.expert} of "
            f"{run.experiment.model.num_experts}, which cannot sample alone; give {run_dir.parent}"
        )
    experts = [_load_one(path.parent, overrides) for path in run_dir.glob(f"expert_*/{CONFIG}")]
    if not experts:
        raise ConfigError(
            f"{str(run_dir)!r} is no run directory: it has no {CONFIG}; give the directory that "
            "`dtr-scale train` wrote, for example runs/demo_digits"
        )
    return _assembled(run_dir, experts)


def _assembled(run_dir: Path, experts: list[TrainedRun]) -> TrainedRun:
    experts = sorted(experts, key=lambda run: run.experiment.model.expert or 0)
    experiment = experts[0].experiment
    numbers = [run.experiment.model.expert for run in experts]
    if numbers != list(range(experiment.model.num_experts)):
        raise ConfigError(
            f"{str(run_dir)!r} holds experts {numbers} of {experiment.model.num_experts}; train "
            "the others with --model.expert=K"
        )
    network = MultiExperts([run.network for run in experts], experiment.diffusion.num_timesteps)
    return TrainedRun(
        experiment,
        network.eval(),
        min(run.step for run in experts),
        tuple(checkpoint for run in experts for checkpoint in run.checkpoints),
    )


def _load_one(run_dir: Path, overrides: Sequence[str]) -> TrainedRun:
    # The directory may have been moved since the run wrote its own path down.
    experiment = load_experiment(run_dir / CONFIG, overrides)
    experiment = experiment.model_copy(update={"run_dir": str(run_dir)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = open_checkpoints(experiment, World(0, 0, 1, device)).newest()
    network = build_network(experiment)
    places = {name: f"ema/{name}" for name, _ in network.named_parameters()}
    places |= {name: f"buffer/{name}" for name in persistent_buffers(network)}
    stored = reader.read(places.values())
    network.load_state_dict({name: stored[key] for name, key in places.items()})
    return TrainedRun(experiment, network.to(device).eval(), reader.meta["step"], (reader.url,))


def draw(run: TrainedRun, num: int) -> Tensor:
    """Return samples 0 to `num` of a run, as its experiment's evaluation draws them."""
    conditions, null_condition = sampling_conditions(run.experiment)
    return draw_samples(
        run.network,
        sampling_settings(run.experiment),
        range(num),
        batch_size=run.experiment.evaluation.batch_size,
        conditions=conditions,
        null_condition=null_condition,
        step=run.mask_step,
        progress=lambda steps: tqdm(steps, desc="sampling", leave=False, disable=None),
    )


def check_output(path: Path, suffix: str) -> None:
    """Raise ConfigError before a long computation whose result could not be written."""
    if path.suffix != suffix or path.is_dir():
        raise ConfigError(f"--out={path} is not accepted; give a file that ends in {suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise ConfigError(
            f"--out={path} cannot be written: {error.strerror}; choose another place"
        ) from None
