"""Measure pictures against a reference, and make references."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dtr_scale import __version__
from dtr_scale.evaluation.features import Extractor, build_extractor
from dtr_scale.evaluation.pictures import Pictures
from dtr_scale.evaluation.reference import (
    NEIGHBOURS,
    SPLIT_SAMPLES,
    Reference,
    ReferenceFile,
    compare,
    measure,
    write_reference,
)
from dtr_scale.jobs.pictures import open_pictures
from dtr_scale.jobs.trained import check_output
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
    if samples.shape != reference.pictures.shape:
        log.warning(
            "samples are %s, the pictures of %s are %s: a distance between sizes is another number",
            list(samples.shape), reference.pictures.source, list(reference.pictures.shape),
        )  # fmt: skip
    metrics: dict[str, float] = {}
    for extractor in extractors:
        metrics |= compare(measure(samples, extractor), reference, extractor)
    manifest = {
        "features": {each.name: each.record() for each in extractors},
        "reference": {each.name: reference.record(each) for each in extractors},
        "neighbours": NEIGHBOURS,
        "inception_score_split": SPLIT_SAMPLES,
        "feature_precision": "fp32",
        "dtr_scale": __version__,
    }
    return metrics, manifest


def build_extractors(features: Sequence[str], weights: Weights) -> list[Extractor]:
    """Return extractors by name, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [build_extractor(name, device, weights.get(name)) for name in dict.fromkeys(features)]


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Store a report whole or not at all."""
    content = json.dumps(report, indent=2) + "\n"
    open_folder(path.parent).write_bytes(path.name, content.encode())
