"""Measure samples against real pictures, and publish the numbers with all they depend on."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dtr_scale.data.reader import Samples
from dtr_scale.evaluation.legibility import legibility
from dtr_scale.evaluation.metrics import frechet_distance
from dtr_scale.storage.folder import open_folder

REPORT, EVALUATIONS = "evaluation.json", "evaluations.jsonl"
"""In the run directory: the newest report, and all of them, one a line."""
_MOST_PIXELS = 4096  # as raw features; larger pictures need a feature extractor


def has_pixel_metrics(samples: Samples) -> bool:
    """Tell whether pictures of this data can be compared pixel by pixel."""
    manifest = samples.manifest
    return manifest.encoding == "pixels" and int(np.prod(manifest.shape)) <= _MOST_PIXELS


def read_all(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Return every sample of a split, float32 [n, C, H, W], and its label, int64 [n]."""
    images, labels = [], []
    for shard, count in enumerate(samples.shard_samples):
        for index in range(count):
            stored, label = samples.read(shard, index)
            images.append(samples.manifest.decode(stored))
            labels.append(label)
    samples.close()
    return np.stack(images), np.array(labels)


def pixel_frechet_distance(images: Tensor | np.ndarray, reference: np.ndarray) -> float:
    """Return the Fréchet distance over raw pixels of [n, C, H, W] in [-1, 1] and a reference."""
    # The sampler clips only where it is asked to; a picture always shows its samples clipped.
    clipped = _clipped(images)
    return frechet_distance(
        clipped.reshape(len(clipped), -1), reference.reshape(len(reference), -1)
    )


def pixel_report(
    images: Tensor | np.ndarray, asked: Tensor, *, train: Samples, held_out: Samples
) -> dict[str, float]:
    """Return the metrics of samples of a data set of small pictures, and of its own training set.

    `legibility` is told of classes, not of one kind of picture. `pixel_frechet_distance` is to the
    held-out pictures; `pixel_frechet_distance_real`, that of the training pictures to the same, is
    what a perfect generator would reach.
    """
    real_images, real_labels = read_all(train)
    reference, _ = read_all(held_out)
    metrics = {
        "pixel_frechet_distance": pixel_frechet_distance(images, reference),
        "pixel_frechet_distance_real": pixel_frechet_distance(real_images, reference),
    }
    if train.manifest.num_classes > 1:
        shown = _clipped(images)
        metrics["legibility"] = legibility(shown, asked.numpy(), real_images, real_labels)
    return metrics


def _clipped(images: Tensor | np.ndarray) -> np.ndarray:
    """Return what a picture shows of samples."""
    return np.clip(np.asarray(images), -1.0, 1.0)


def write_report(run_dir: Path, metrics: dict[str, float], manifest: dict[str, Any]) -> Path:
    """Store the numbers with their manifest, beside all earlier ones, too; return where."""
    report = {"metrics": metrics, "manifest": manifest}
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="seconds"), **report}) + "\n"
    # One write at the end of the file: of two evaluations at once neither is lost.
    with (run_dir / EVALUATIONS).open("ab", buffering=0) as file:
        file.write(line.encode())
        os.fsync(file.fileno())
    content = json.dumps(report, indent=2) + "\n"
    # Whole or not at all: half a report would end every program that compares runs.
    open_folder(run_dir).write_bytes(REPORT, content.encode())
    return run_dir / REPORT


def is_newest_report(run_dir: Path, metrics: dict[str, float], manifest: dict[str, Any]) -> bool:
    """Tell whether the last of the run's evaluations is this one."""
    try:
        *_, last = (run_dir / EVALUATIONS).read_bytes().splitlines()
        stored = json.loads(last)
        # As JSON gives it back: tuples have become lists.
        return [stored["metrics"], stored["manifest"]] == json.loads(
            json.dumps([metrics, manifest])
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False
