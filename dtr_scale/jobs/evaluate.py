"""Measure samples of a trained run against its held-out split."""

from collections.abc import Sequence
from pathlib import Path

from dtr_scale.errors import EvaluationError
from dtr_scale.evaluation.report import has_pixel_metrics, pixel_report, write_report
from dtr_scale.evaluation.sampling import class_labels
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.jobs.trained import draw, load_run


def evaluate_run(
    run_dir: Path, *, num_samples: int | None = None, overrides: Sequence[str] = ()
) -> tuple[dict[str, float], Path]:
    """Measure samples of a run against its held-out split; return the metrics and the report.

    `overrides` are those of evaluation.
    """
    run = load_run(run_dir, overrides)
    experiment = run.experiment
    if experiment.data.type == "synthetic":
        raise EvaluationError(f"{run_dir} was trained on made-up data; there is nothing to measure")
    train, held_out = open_samples(experiment), open_samples(experiment, "val")
    if not has_pixel_metrics(held_out):
        raise EvaluationError(
            f"{run_dir} holds samples of shape {list(held_out.manifest.shape)} "
            f"({held_out.manifest.encoding}); only small pixel data can be measured so far"
        )
    num_samples = num_samples or experiment.evaluation.num_samples
    images = draw(run, num_samples)
    asked = class_labels(range(num_samples), run.network.num_classes)
    metrics = pixel_report(images, asked, train=train, held_out=held_out)
    # All that two results must share to be put side by side.
    manifest = {
        **sampling_settings(experiment).manifest(),
        "num_samples": num_samples,
        "features": "pixels",
        "decoder": None,
        "precision": "fp32",
        "ema": run.averages,
        "checkpoints": run.checkpoints,
        "step": run.step,
        "reference": {"split": "val", "manifest_hash": held_out.manifest.hash("val")},
    }
    return metrics, write_report(run_dir, metrics, manifest)
