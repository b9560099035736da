"""Measure a run of the micro reproduction, and what real pictures reach by the same numbers."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtr_scale.data.reader import Samples
from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.features import Extractor, build_extractor
from dtr_scale.evaluation.grid import save_grid
from dtr_scale.evaluation.legibility import legibility
from dtr_scale.evaluation.metrics import moments_distance
from dtr_scale.evaluation.pictures import ROUNDING, ArrayPictures, to_uint8
from dtr_scale.evaluation.precision import cast, resolve_precision
from dtr_scale.evaluation.reference import Reference, measure
from dtr_scale.evaluation.report import pixel_frechet_distance, read_all, write_report
from dtr_scale.evaluation.sampling import class_labels, draw_samples
from dtr_scale.jobs.build import build_diffusion, open_samples
from dtr_scale.jobs.measure import samples_manifest
from dtr_scale.jobs.micro.comparison import Micro
from dtr_scale.jobs.pictures import ShardPictures
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.jobs.trained import TrainedRun, load_run, write_whole
from dtr_scale.prepare.encode import decoder_of
from dtr_scale.randomness import keyed_generator
from dtr_scale.storage.folder import open_folder
from dtr_scale.train.run_dir import SAMPLES

log = logging.getLogger(__name__)

FD, PIXEL_FD, LOSS = "fd_efficientnet", "pixel_frechet_distance", "eval_loss"
LEGIBILITY = "legibility"
REAL = "real.json"
JUDGE_PICTURES = 6000  # a support vector machine takes minutes for all 60,000
_LOSS_TIMESTEPS, _LOSS_DRAWS_PER_TIMESTEP = 64, 16
_FEATURES = "efficientnet"


def measure_run(run_dir: Path, step: int, *, with_legibility: bool) -> None:
    """Measure what a run has trained to `step`, and write it among the run's evaluations."""
    run = load_run(run_dir)
    if run.step != step:
        raise EvaluationError(
            f"{run_dir} stands at step {run.step} and was not measured at step {step}; remove it, "
            "and it is trained again"
        )
    experiment = run.experiment
    held_out = open_samples(experiment, "val")
    extractor = build_extractor(_FEATURES, run_device(run))
    reference = _reference(experiment.data.shards, held_out)
    # In fp32, before the network is cast for its samples.
    loss = held_out_loss(run, held_out)
    precision = resolve_precision(experiment.evaluation.precision, run_device(run))
    images = draw_samples(
        cast(run.network, precision),
        sampling_settings(experiment),
        range(experiment.evaluation.num_samples),
        batch_size=experiment.evaluation.batch_size,
        step=run.mask_step,
    )
    metrics = {
        FD: _distance(images, reference, extractor),
        PIXEL_FD: pixel_frechet_distance(images, read_all(held_out)[0]),
        LOSS: loss,
    }
    asked = class_labels(range(len(images)), run.network.num_classes)
    if with_legibility:
        judge = _judge(open_samples(experiment))
        metrics[LEGIBILITY] = legibility(images.clamp(-1, 1).numpy(), asked.numpy(), *judge)
    columns = run.network.num_classes
    picture = run_dir / SAMPLES / f"step_{step:08d}.png"
    write_whole(picture, lambda file: save_grid(file, images[: 4 * columns], columns=columns))
    manifest = {
        **samples_manifest(
            experiment,
            num_samples=len(images),
            precision=precision,
            averages=run.averages,
            checkpoints=run.checkpoints,
            step=run.step,
        ),
        "features": {extractor.name: extractor.record()},
        "reference": {extractor.name: reference.record(extractor)},
        "rounding": ROUNDING,
        "eval_loss_draws": _LOSS_TIMESTEPS * _LOSS_DRAWS_PER_TIMESTEP,
        "legibility_judge": f"SVC, {JUDGE_PICTURES} training pictures" if with_legibility else None,
    }
    write_report(run_dir, metrics, manifest)
    log.info("step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))


def measure_real(micro: Micro) -> dict[str, float]:
    """Return what real training pictures reach by the same numbers; computed once.

    Their distance is the floor: as many training pictures as there are samples, against the held-
    out ones. The features of the held-out pictures are kept for all runs.
    """
    path = micro.out / REAL
    if path.exists():
        return json.loads(path.read_bytes())
    experiment = micro.base
    held_out, train = open_samples(experiment, "val"), open_samples(experiment)
    extractor = build_extractor(_FEATURES, torch.device("cpu"))
    pictures, labels = read_all(held_out)
    judge = _judge(train)
    count = experiment.evaluation.num_samples
    real = torch.from_numpy(judge[0][:count])
    found = {
        FD: _distance(real, _reference(experiment.data.shards, held_out), extractor),
        PIXEL_FD: pixel_frechet_distance(real, pictures),
        LEGIBILITY: legibility(pictures[:count], labels[:count], *judge),
        "num_pictures": len(real),
    }
    open_folder(micro.out).write_bytes(REAL, json.dumps(found, indent=2).encode() + b"\n")
    return found


def held_out_loss(run: TrainedRun, held_out: Samples) -> float:
    """Return the unweighted mean of mse + vb at timesteps, pictures and noise that never change."""
    diffusion = build_diffusion(run.experiment)
    pictures, labels = read_all(held_out)
    timesteps = (np.arange(_LOSS_TIMESTEPS) + 0.5) * diffusion.num_timesteps / _LOSS_TIMESTEPS
    losses = []
    for i, t in enumerate(timesteps.astype(int)):
        first = i * _LOSS_DRAWS_PER_TIMESTEP
        places = np.arange(first, first + _LOSS_DRAWS_PER_TIMESTEP) % len(pictures)
        x_start = torch.from_numpy(pictures[places])
        noise = keyed_generator(0, "micro.held_out", i).standard_normal(x_start.shape, np.float32)
        y = torch.from_numpy(labels[places])
        with torch.no_grad():
            terms = diffusion.training_losses(
                lambda x, t, y=y: run.network(x, t, y, run.mask_step),
                x_start,
                torch.full((len(places),), int(t)),
                torch.from_numpy(noise),
            )
        losses.append((terms["mse"] + terms["vb"]).double().mean().item())
    return float(np.mean(losses))


def run_device(run: TrainedRun) -> torch.device:
    return next(run.network.parameters()).device


def _reference(shards: str | None, held_out: Samples) -> Reference:
    decoder = decoder_of(held_out.manifest, None, torch.device("cpu"))
    return Reference(ShardPictures(held_out, "val", decoder, str(shards)))


def _distance(images: torch.Tensor, reference: Reference, extractor: Extractor) -> float:
    pictures = ArrayPictures(to_uint8(images).numpy(), "samples")
    # Without precision and recall, which compare every pair of pictures: minutes a point.
    found = measure(pictures, extractor).moments
    return moments_distance(found, reference.moments(extractor)[0])


def _judge(train: Samples) -> tuple[Any, Any]:
    """Return the real pictures and labels that the judge of legibility learns from."""
    places = [(shard, i) for shard, size in enumerate(train.shard_samples) for i in range(size)]
    # Preparing has mixed them: the first are of all classes.
    read = [train.read(*place) for place in places[:JUDGE_PICTURES]]
    train.close()
    decode = train.manifest.decode
    return np.stack([decode(stored) for stored, _ in read]), np.array([y for _, y in read])
