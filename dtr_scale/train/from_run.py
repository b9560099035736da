"""What a trained run is good for: samples and metrics, from its newest complete checkpoint."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dtr_scale.checkpoint.layout import CheckpointReader
from dtr_scale.config.load import load_experiment
from dtr_scale.config.schema import Experiment
from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError, EvaluationError
from dtr_scale.evaluation.report import has_pixel_metrics, pixel_report, write_report
from dtr_scale.evaluation.sampling import class_labels, draw_samples, grid_columns, save_grid
from dtr_scale.models.dit import DiT
from dtr_scale.train.build import (
    build_network,
    open_checkpoints,
    open_samples,
    sampling_settings,
)
from dtr_scale.train.run_dir import CONFIG, SAMPLES


def sample_run(run_dir: Path, *, num: int, out: Path | None = None) -> Path:
    """Draw samples 0 to `num` of a run into one picture; return its path."""
    experiment, network, _ = load_run(run_dir)
    images = _draw(experiment, network, num)
    if images.shape[1] not in (1, 3):
        raise EvaluationError(
            f"samples of {run_dir} have {images.shape[1]} channels and need a decoder to be seen; "
            "pictures of 1 or 3 channels can be shown"
        )
    path = out or run_dir / SAMPLES / "grid.png"
    save_grid(path, images, columns=grid_columns(network.num_classes))
    return path


def evaluate_run(run_dir: Path, *, num_samples: int | None = None) -> tuple[dict[str, float], Path]:
    """Measure samples of a run against its held-out split; return the metrics and the report."""
    experiment, network, reader = load_run(run_dir)
    train, held_out = open_samples(experiment), open_samples(experiment, "val")
    if not has_pixel_metrics(held_out):
        raise EvaluationError(
            f"{run_dir} holds samples of shape {list(held_out.manifest.shape)} "
            f"({held_out.manifest.encoding}); only small pixel data can be measured so far"
        )
    num = num_samples or experiment.evaluation.num_samples
    images = _draw(experiment, network, num)
    asked = class_labels(range(num), network.num_classes)
    metrics = pixel_report(images, asked, train=train, held_out=held_out)
    manifest = {
        **sampling_settings(experiment).manifest(),
        "num_samples": num,
        "features": "pixels",
        "decoder": None,
        "precision": "fp32",
        "ema_decay": experiment.train.ema_decay,
        "checkpoint": reader.url,
        "step": reader.meta["step"],
        "reference": {"split": "val", "manifest_hash": held_out.manifest.hash("val")},
    }
    return metrics, write_report(run_dir, metrics, manifest)


def load_run(run_dir: Path) -> tuple[Experiment, DiT, CheckpointReader]:
    """Return a run's experiment, its network with averaged weights, and the checkpoint read."""
    if not (run_dir / CONFIG).exists():
        raise ConfigError(
            f"{str(run_dir)!r} is no run directory: it has no {CONFIG}; give the directory that "
            "`dtr-scale train` wrote, for example runs/demo_digits"
        )
    # The directory may have been moved since the run wrote its own path down.
    experiment = load_experiment(run_dir / CONFIG).model_copy(update={"run_dir": str(run_dir)})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reader = open_checkpoints(experiment, World(0, 0, 1, device)).newest()
    network = build_network(experiment)
    weights = {name: reader.read_whole(f"ema/{name}") for name, _ in network.named_parameters()}
    network.load_state_dict(weights)
    return experiment, network.to(device).eval(), reader


def _draw(experiment: Experiment, network: DiT, num: int) -> Tensor:
    return draw_samples(
        network,
        sampling_settings(experiment),
        range(num),
        batch_size=experiment.evaluation.batch_size,
        progress=lambda steps: tqdm(steps, desc="sampling", leave=False, disable=None),
    )
