"""What a trained run is good for: samples and metrics, from its newest complete checkpoint."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dtr_scale.config.load import load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError, EvaluationError
from dtr_scale.evaluation.report import has_pixel_metrics, pixel_report, write_report
from dtr_scale.evaluation.sampling import class_labels, draw_samples, grid_columns, save_grid
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.experts import MultiExperts
from dtr_scale.train.build import (
    build_network,
    open_checkpoints,
    open_samples,
    sampling_conditions,
    sampling_settings,
)
from dtr_scale.train.run_dir import CONFIG, SAMPLES


class TrainedRun(NamedTuple):
    """A run's experiment and its network with averaged weights, as its newest checkpoint has it."""

    experiment: Experiment
    network: Denoiser
    step: int
    checkpoints: tuple[str, ...]
    """Where they were read: one, or one per expert."""


def sample_run(run_dir: Path, *, num: int, out: Path | None = None) -> Path:
    """Draw samples 0 to `num` of a run into one picture; return its path."""
    run = load_run(run_dir)
    images = _draw(run, num)
    if images.shape[1] not in (1, 3):
        raise EvaluationError(
            f"samples of {run_dir} have {images.shape[1]} channels and need a decoder to be seen; "
            "pictures of 1 or 3 channels can be shown"
        )
    path = out or run_dir / SAMPLES / "grid.png"
    save_grid(path, images, columns=grid_columns(run.network.num_classes))
    return path


def evaluate_run(run_dir: Path, *, num_samples: int | None = None) -> tuple[dict[str, float], Path]:
    """Measure samples of a run against its held-out split; return the metrics and the report."""
    run = load_run(run_dir)
    experiment = run.experiment
    train, held_out = open_samples(experiment), open_samples(experiment, "val")
    if not has_pixel_metrics(held_out):
        raise EvaluationError(
            f"{run_dir} holds samples of shape {list(held_out.manifest.shape)} "
            f"({held_out.manifest.encoding}); only small pixel data can be measured so far"
        )
    num = num_samples or experiment.evaluation.num_samples
    images = _draw(run, num)
    asked = class_labels(range(num), run.network.num_classes)
    metrics = pixel_report(images, asked, train=train, held_out=held_out)
    manifest = {
        **sampling_settings(experiment).manifest(),
        "num_samples": num,
        "features": "pixels",
        "decoder": None,
        "precision": "fp32",
        "ema_decay": experiment.train.ema_decay,
        "checkpoints": run.checkpoints,
        "step": run.step,
        "reference": {"split": "val", "manifest_hash": held_out.manifest.hash("val")},
    }
    return metrics, write_report(run_dir, metrics, manifest)


def load_run(run_dir: Path) -> TrainedRun:
    """Return what a run has trained; experts in `expert_*` below `run_dir` come as one network."""
    if (run_dir / CONFIG).exists():
        run = _load_one(run_dir)
        if run.experiment.model.expert is None:
            return run
        raise ConfigError(
            f"{str(run_dir)!r} holds expert {run.experiment.model.expert} of "
            f"{run.experiment.model.num_experts}, which cannot sample alone; give {run_dir.parent}"
        )
    experts = [_load_one(path.parent) for path in run_dir.glob(f"expert_*/{CONFIG}")]
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


def _load_one(run_dir: Path) -> TrainedRun:
    # The directory may have been moved since the run wrote its own path down.
    experiment = load_experiment(run_dir / CONFIG).model_copy(update={"run_dir": str(run_dir)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = open_checkpoints(experiment, World(0, 0, 1, device)).newest()
    network = build_network(experiment)
    weights = {name: reader.read_whole(f"ema/{name}") for name, _ in network.named_parameters()}
    network.load_state_dict(network.state_dict() | weights)
    return TrainedRun(experiment, network.to(device).eval(), reader.meta["step"], (reader.url,))


def _draw(run: TrainedRun, num: int) -> Tensor:
    return draw_samples(
        run.network,
        sampling_settings(run.experiment),
        range(num),
        batch_size=run.experiment.evaluation.batch_size,
        conditions=sampling_conditions(run.experiment),
        step=run.step,
        progress=lambda steps: tqdm(steps, desc="sampling", leave=False, disable=None),
    )
