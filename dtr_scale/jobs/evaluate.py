"""Measure samples of a trained run against its held-out split, or against a reference file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dtr_scale.data.reader import Samples
from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.features import Extractor
from dtr_scale.evaluation.reference import Reference, ReferenceFile
from dtr_scale.evaluation.report import has_pixel_metrics, pixel_report, write_report
from dtr_scale.evaluation.sampling import class_labels
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.measure import Weights, build_extractors, measure_against
from dtr_scale.jobs.pictures import DrawnPictures, ShardPictures, decoder_sha256
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.jobs.trained import TrainedRun, draw, load_run
from dtr_scale.prepare.encode import PictureEncoder, decoder_of

_HELD_OUT = "val"
_DEFAULT_FEATURES = ("efficientnet",)  # needs no download


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
    `features` or a `reference` are named, are decoded and compared by features. `overrides` are
    those of evaluation.
    """
    run = load_run(run_dir, overrides)
    experiment = run.experiment
    if experiment.data.type == "synthetic":
        raise EvaluationError(f"{run_dir} was trained on made-up data; there is nothing to measure")
    held_out = open_samples(experiment, _HELD_OUT)
    num_samples = num_samples or experiment.evaluation.num_samples
    if has_pixel_metrics(held_out) and not features and reference is None:
        metrics, manifest = _by_pixels(run, draw(run, num_samples), held_out)
    else:
        # Before samples are drawn, which takes the time: what is missing is told at once.
        extractors = build_extractors(features or _DEFAULT_FEATURES, weights or {})
        decoder = decoder_of(held_out.manifest, vae, extractors[0].device)
        compared = (
            ReferenceFile(reference)
            if reference
            else Reference(ShardPictures(held_out, _HELD_OUT, decoder, str(experiment.data.shards)))
        )
        images = draw(run, num_samples)
        metrics, manifest = _by_features(images, decoder, compared, extractors)
    # All that two results must share to be put side by side.
    manifest = {
        **sampling_settings(experiment).manifest(),
        "num_samples": num_samples,
        "labels": "in turn" if experiment.model.conditioning == "class" else "held-out captions",
        "precision": "fp32",
        "ema": run.averages,
        "checkpoints": run.checkpoints,
        "step": run.step,
        **manifest,
    }
    path = write_report(run_dir, metrics, manifest)
    return {"metrics": metrics, "manifest": manifest}, path


def _by_pixels(
    run: TrainedRun, images: Tensor, held_out: Samples
) -> tuple[dict[str, float], dict[str, Any]]:
    asked = class_labels(range(len(images)), run.network.num_classes)
    train = open_samples(run.experiment)
    metrics = pixel_report(images, asked, train=train, held_out=held_out)
    reference = {"split": _HELD_OUT, "manifest_hash": held_out.manifest.hash(_HELD_OUT)}
    return metrics, {"features": "pixels", "decoder": None, "reference": reference}


def _by_features(
    images: Tensor, decoder: PictureEncoder, reference: Reference, extractors: Sequence[Extractor]
) -> tuple[dict[str, float], dict[str, Any]]:
    samples = DrawnPictures(images, decoder, "samples")
    metrics, manifest = measure_against(samples, reference, extractors)
    told = {"decoder": decoder_sha256(decoder), "rounding": "127.5 x + 128, cut off"}
    return metrics, {**told, **manifest}
