"""Measure samples of a trained run against its held-out split, or against a reference file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.report import pixel_report, write_report
from dtr_scale.evaluation.sampling import class_labels
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.measure import (
    HELD_OUT,
    Weights,
    build_extractors,
    default_features,
    feature_weights,
    features_manifest,
    is_measured_by_pixels,
    measure_against,
    open_reference,
    pixels_manifest,
    samples_manifest,
)
from dtr_scale.jobs.pictures import DrawnPictures
from dtr_scale.jobs.trained import TrainedRun, draw, load_run
from dtr_scale.prepare.encode import decoder_of


def evaluate_run(
    run_dir: Path,
    *,
    num_samples: int | None = None,
    reference: Path | None = None,
    features: Sequence[str] = (),
    weights: Weights | None = None,
    vae: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[dict[str, Any], Path]:
    """Measure samples of a run; return metrics with their manifest, and where they are stored.

    Small pixels are compared with the held-out split as they are. Others, and those for which
    `features` or a `reference` are named, are decoded and compared by features, as in training.
    What is not given here is as the run's evaluation says; `overrides` are those of evaluation.
    """
    run = load_run(run_dir, overrides)
    experiment = run.experiment
    if experiment.data.type == "synthetic":
        raise EvaluationError(f"{run_dir} was trained on made-up data; there is nothing to measure")
    asked = experiment.evaluation
    reference = reference or (Path(asked.reference) if asked.reference else None)
    features = features or asked.features
    num_samples = num_samples or asked.num_samples
    if not features and reference is None and is_measured_by_pixels(experiment):
        metrics, manifest = _by_pixels(run, draw(run, num_samples))
    else:
        given = {name: path for name, path in (weights or {}).items() if path}
        files = {**feature_weights(asked), **given}
        # Before samples are drawn, which takes the time: what is missing is told at once.
        extractors = build_extractors(features or default_features(files), files)
        data = open_samples(experiment).manifest
        decoder = decoder_of(data, vae or asked.vae, extractors[0].device)
        compared = open_reference(experiment, reference, decoder)
        samples = DrawnPictures(draw(run, num_samples), decoder, "samples")
        metrics = measure_against(samples, compared, extractors)[0]
        manifest = features_manifest(decoder, compared, extractors)
    # All that two results must share to be put side by side.
    manifest = {
        **samples_manifest(
            experiment,
            num_samples=num_samples,
            precision="fp32",
            averages=run.averages,
            checkpoints=run.checkpoints,
            step=run.step,
        ),
        **manifest,
    }
    path = write_report(run_dir, metrics, manifest)
    return {"metrics": metrics, "manifest": manifest}, path


def _by_pixels(run: TrainedRun, images: Tensor) -> tuple[dict[str, float], dict[str, Any]]:
    held_out = open_samples(run.experiment, HELD_OUT)
    asked = class_labels(range(len(images)), run.network.num_classes)
    train = open_samples(run.experiment)
    metrics = pixel_report(images, asked, train=train, held_out=held_out)
    return metrics, pixels_manifest(held_out)
