"""Measure pictures against a reference, and make references."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtr_scale import __version__
from dtr_scale.config.schema import EvaluationConfig, Experiment
from dtr_scale.data.reader import Samples
from dtr_scale.evaluation.features import Extractor, build_extractor, inception_is_here
from dtr_scale.evaluation.pictures import ROUNDING, Pictures
from dtr_scale.evaluation.reference import (
    NEIGHBOURS,
    SPLIT_SAMPLES,
    Reference,
    ReferenceFile,
    compare,
    measure,
    warn_of_sizes,
    write_reference,
)
from dtr_scale.evaluation.report import has_pixel_metrics
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.pictures import ShardPictures, decoder_sha256, open_pictures
from dtr_scale.jobs.sampling import HELD_OUT, reference_split, sampling_settings
from dtr_scale.jobs.trained import check_output
from dtr_scale.prepare.encode import PictureEncoder
from dtr_scale.storage.folder import open_folder

log = logging.getLogger(__name__)

Weights = Mapping[str, Path | None]
"""Files of extractors' weights by name; None: the usual ones."""


def make_reference(
    source: str,
    out: Path,
    *,
    features: Sequence[str],
    weights: Weights,
    size: int | None = None,
    split: str = "train",
    vae: str | None = None,
    num_pictures: int = 10_000,
) -> Path:
    """Write a reference of a folder of pictures, an .npz or prepared data; return its path."""
    check_output(out, ".npz")
    extractors = build_extractors(features, weights)
    device = extractors[0].device
    pictures = open_pictures(source, size=size, split=split, vae=vae, device=device)
    manifest = {"of": pictures.source, "set_shape": list(pictures.shape)}
    write_reference(out, pictures, extractors, num_pictures=num_pictures, manifest=manifest)
    return out


def measure_pictures(
    source: str,
    reference: Path,
    *,
    features: Sequence[str],
    weights: Weights,
    split: str = "train",
    vae: str | None = None,
) -> dict[str, Any]:
    """Return the metrics of anybody's pictures against a reference, and their manifest."""
    extractors = build_extractors(features, weights)
    device = extractors[0].device
    pictures = open_pictures(source, size=None, split=split, vae=vae, device=device)
    metrics, manifest = measure_against(pictures, ReferenceFile(reference), extractors)
    told = {"source": pictures.source, "sha256": pictures.sha256, "shape": list(pictures.shape)}
    return {
        "metrics": metrics,
        "manifest": {"num_samples": len(pictures), "samples": told, **manifest},
    }


def measure_against(
    samples: Pictures, reference: Reference, extractors: Sequence[Extractor]
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the metrics of samples by all extractors, and what they depend on but the samples."""
    warn_of_sizes(samples.shape, reference)
    metrics: dict[str, float] = {}
    for extractor in extractors:
        metrics |= compare(measure(samples, extractor), reference, extractor)
    return metrics, _compared(reference, extractors)


def _compared(reference: Reference, extractors: Sequence[Extractor]) -> dict[str, Any]:
    """Return what a manifest tells of a comparison of features."""
    return {
        "features": {each.name: each.record() for each in extractors},
        "reference": {each.name: reference.record(each) for each in extractors},
        "neighbours": NEIGHBOURS,
        "inception_score_split": SPLIT_SAMPLES,
        "feature_precision": "fp32",
        "dtr_scale": __version__,
    }


def features_manifest(
    decoder: PictureEncoder, reference: Reference, extractors: Sequence[Extractor]
) -> dict[str, Any]:
    """Return what a manifest tells of samples that are decoded and compared by features."""
    record = decoder.record
    told = {
        "decoder": decoder_sha256(decoder),
        "decoder_precision": record.precision if record else None,
        "rounding": ROUNDING,
    }
    return {**told, **_compared(reference, extractors)}


def pixels_manifest(held_out: Samples) -> dict[str, Any]:
    """Return what a manifest tells of samples that are compared by their pixels."""
    reference = {"split": HELD_OUT, "manifest_hash": held_out.manifest.hash(HELD_OUT)}
    return {"features": "pixels", "decoder": None, "reference": reference}


def samples_manifest(
    experiment: Experiment,
    *,
    num_samples: int,
    precision: str,
    averages: Sequence[Any],
    checkpoints: Sequence[str],
    step: int,
) -> dict[str, Any]:
    """Return what a manifest tells of a run's samples."""
    told = {"class": experiment.evaluation.labels, "text": "held-out captions"}
    return {
        **sampling_settings(experiment).manifest(),
        "num_samples": num_samples,
        "labels": told.get(experiment.model.conditioning, "none"),
        "precision": precision,
        "ema": averages,
        "checkpoints": checkpoints,
        "step": step,
    }


def is_measured_by_pixels(experiment: Experiment) -> bool:
    """Tell whether samples are compared pixel by pixel unless features are asked for."""
    if reference_split(experiment) != HELD_OUT:
        return False
    return has_pixel_metrics(open_samples(experiment, HELD_OUT))


def open_reference(
    experiment: Experiment, path: str | Path | None, decoder: PictureEncoder
) -> Reference:
    """Return a reference file, or the pictures of a split of the data."""
    if path is not None:
        return ReferenceFile(Path(path))
    split = reference_split(experiment)
    samples = open_samples(experiment, split)
    return Reference(ShardPictures(samples, split, decoder, str(experiment.data.shards)))


def feature_weights(evaluation: EvaluationConfig) -> dict[str, Path | None]:
    """Return the files of weights that an experiment names."""
    named = {"inception": evaluation.inception_weights, "dinov2": evaluation.dinov2_weights}
    return {name: Path(path) if path else None for name, path in named.items()}


def default_features(weights: Weights) -> list[str]:
    """Return Inception where its weights are at hand, else what comes as a package."""
    return ["inception"] if weights.get("inception") or inception_is_here() else ["efficientnet"]


def build_extractors(
    features: Sequence[str], weights: Weights, device: torch.device | None = None
) -> list[Extractor]:
    """Return extractors by name, on the GPU where there is one."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [build_extractor(name, device, weights.get(name)) for name in dict.fromkeys(features)]


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Store a report whole or not at all."""
    content = json.dumps(report, indent=2) + "\n"
    open_folder(path.parent).write_bytes(path.name, content.encode())
