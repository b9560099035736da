"""Measure samples of a trained run against its held-out split, or against a reference file."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from dtr_scale.engines.world import World
from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.features import Extractor
from dtr_scale.evaluation.reference import Reference
from dtr_scale.evaluation.report import REPORT, pixel_report, write_report
from dtr_scale.evaluation.sampling import sample_labels
from dtr_scale.evaluation.stored import TOLD_ALONE, StoredBatches, StoredPictures
from dtr_scale.jobs.averages import Choice
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.conditions import Wanted, conditions_of
from dtr_scale.jobs.drawing import Drawing, draw_stored
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
)
from dtr_scale.jobs.ranks import joined_ranks
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.jobs.trained import TrainedRun, load_run
from dtr_scale.prepare.encode import PictureEncoder, decoder_of
from dtr_scale.train.run_dir import SAMPLES


class _Compared(NamedTuple):
    """What samples are measured by features against, by rank 0 alone."""

    decoder: PictureEncoder
    reference: Reference
    extractors: list[Extractor]


def evaluate_run(
    run_dir: Path,
    *,
    num_samples: int | None = None,
    reference: Path | None = None,
    features: Sequence[str] = (),
    weights: Weights | None = None,
    vae: str | None = None,
    choice: Choice | None = None,
    overrides: Sequence[str] = (),
) -> tuple[dict[str, Any], Path]:
    """Measure samples of a run; return metrics with their manifest, and where they are stored.

    Small pixels are compared with the held-out split as they are. Others, and those for which
    `features` or a `reference` are named, are decoded and compared by features, as in training.
    What is not given here is as the run's evaluation says; `overrides` are those of evaluation.

    Under a launcher all ranks draw; rank 0 measures, and the report is empty on the others. Where a
    job was killed the next one goes on with its samples. Raises UnfinishedError where this one is
    asked to leave while it draws.
    """
    with ExitStack() as stack:
        joined = stack.enter_context(ExitStack())
        ranks = joined.enter_context(joined_ranks())
        world = ranks.world
        run = load_run(run_dir, overrides, choice, world)
        asked = run.experiment.evaluation
        with world.agree():
            # Before samples are drawn, which takes the time: what is missing is told at once.
            compared, decoder = _compared(run, world, reference, features, weights or {}, vae)
            conditions = conditions_of(run.experiment, Wanted(), world.device)
        drawing = Drawing(run, num_samples or asked.num_samples, conditions, decoder)
        manifest = world.broadcast_object(drawing.manifest(world.device) if world.is_main else None)
        path = run_dir / SAMPLES / f"evaluated_{_short_hash(manifest)}.parts"
        stored = StoredBatches(path, drawing.num_samples, asked.batch_size)
        stack.enter_context(closing(stored))
        with world.agree():
            if world.is_main:
                stored.begin(manifest)
        draw_stored(drawing, stored, ranks)
        # The other ranks are gone. From here a signal ends this one at once; the samples stay.
        joined.close()
        if not world.is_main:
            return {}, run_dir / REPORT
        metrics, told = _by_features(stored, compared) if compared else _by_pixels(run, stored)
        # All that two results must share to be put side by side.
        manifest = {**manifest, **told}
        report = write_report(run_dir, metrics, manifest)
        stored.remove()
    return {"metrics": metrics, "manifest": manifest}, report


def _compared(
    run: TrainedRun,
    world: World,
    reference: Path | None,
    features: Sequence[str],
    weights: Weights,
    vae: str | None,
) -> tuple[_Compared | None, PictureEncoder | None]:
    """Return what rank 0 measures by features and what decodes; None, None for pixels."""
    experiment, asked = run.experiment, run.experiment.evaluation
    if experiment.data.type == "synthetic":
        raise EvaluationError(
            f"{experiment.run_dir} was trained on made-up data; there is nothing to measure"
        )
    reference = reference or (Path(asked.reference) if asked.reference else None)
    features = features or asked.features
    if not features and reference is None and is_measured_by_pixels(experiment):
        return None, None
    decoder = decoder_of(open_samples(experiment).manifest, vae or asked.vae, world.device)
    if not world.is_main:
        return None, decoder
    given = {name: path for name, path in weights.items() if path}
    files = {**feature_weights(asked), **given}
    extractors = build_extractors(features or default_features(files), files, world.device)
    return _Compared(decoder, open_reference(experiment, reference, decoder), extractors), decoder


def _short_hash(manifest: dict[str, Any]) -> str:
    # Where samples come from may change: a run that was moved has the same ones.
    told = {key: value for key, value in manifest.items() if key not in TOLD_ALONE}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def _by_pixels(run: TrainedRun, stored: StoredBatches) -> tuple[dict[str, float], dict[str, Any]]:
    count, num_classes = stored.num_samples, run.network.num_classes
    asked = sample_labels(sampling_settings(run.experiment), range(count), num_classes)
    held_out, train = open_samples(run.experiment, HELD_OUT), open_samples(run.experiment)
    # Small pictures, whose pixels are the features: the metrics need all of them.
    metrics = pixel_report(stored.first(count), asked, train=train, held_out=held_out)
    return metrics, pixels_manifest(held_out)


def _by_features(
    stored: StoredBatches, compared: _Compared
) -> tuple[dict[str, float], dict[str, Any]]:
    samples = StoredPictures(stored, "samples")
    metrics, _ = measure_against(samples, compared.reference, compared.extractors)
    return metrics, features_manifest(*compared)
