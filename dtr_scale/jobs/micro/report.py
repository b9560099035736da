"""Tell what the micro reproduction has found: a table, a figure, and what they show and do not."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from dtr_scale.evaluation.comparison.curves import Curve
from dtr_scale.evaluation.comparison.plots import Chart, drawings_png
from dtr_scale.jobs.micro.comparison import CONDITIONS, Micro, MicroRun
from dtr_scale.jobs.micro.measure import FD, LEGIBILITY, LOSS, PIXEL_FD, REAL
from dtr_scale.jobs.trained import write_whole
from dtr_scale.storage.folder import open_folder
from dtr_scale.tracking.journal import last_step
from dtr_scale.train.run_dir import JOURNAL, SAMPLES

FIGURE, TABLE, NUMBERS, SHEET = "micro.png", "micro.md", "micro.json", "samples.png"


class Claim(NamedTuple):
    """What the paper says of two conditions."""

    told: str
    better: str
    worse: str
    where: str


CLAIMS = (
    Claim("R-TR is worse than no routing", "none_vanilla", "random_vanilla", "table 1"),
    Claim("DTR is better than no routing", "dtr_vanilla", "none_vanilla", "table 1"),
    Claim("DTR is better than R-TR", "dtr_vanilla", "random_vanilla", "table 1"),
    Claim("ANT-UW is better than no weights", "none_antuw", "none_vanilla", "table 2"),
    Claim("DTR helps with ANT-UW, too", "dtr_antuw", "none_antuw", "table 2"),
    Claim("Min-SNR helps with DTR, too", "dtr_minsnr", "dtr_vanilla", "table 2"),
    Claim("ANT-UW helps with DTR, too", "dtr_antuw", "dtr_vanilla", "table 2"),
)
# Of Student's t for 95%, two-sided, by degrees of freedom; more are near the last.
_STUDENT_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def results(micro: Micro) -> dict[str, Any]:
    """Return everything that is measured so far, as plain JSON data."""
    batch = micro.base.train.global_batch_size
    real = micro.out / REAL
    return {
        "points": micro.points,
        "samples_seen": [batch * step for step in micro.points],
        "num_samples": micro.base.evaluation.num_samples,
        "real": json.loads(real.read_bytes()) if real.exists() else {},
        "runs": {run.name: _run(micro, run) for run in micro.runs},
        "claims": [_verdict(micro, claim) for claim in CLAIMS if _is_told(micro, claim)],
    }


def _run(micro: Micro, run: MicroRun) -> dict[str, Any]:
    measured = micro.measured(run)
    return {
        "condition": run.condition,
        "seed": run.seed,
        "step": last_step(micro.run_dir(run) / JOURNAL),
        "max_steps": micro.points[-1],
        "metrics": {str(step): measured[step] for step in micro.points if step in measured},
    }


def _is_told(micro: Micro, claim: Claim) -> bool:
    return {claim.better, claim.worse} <= set(micro.conditions)


def _last(micro: Micro, condition: str, metric: str) -> dict[int, float]:
    """Return a number at the end of training, by seed."""
    found = {}
    for seed in range(micro.num_seeds):
        metrics = micro.measured(MicroRun(condition, seed)).get(micro.points[-1], {})
        if metric in metrics:
            found[seed] = metrics[metric]
    return found


def _verdict(micro: Micro, claim: Claim) -> dict[str, Any]:
    """Compare two conditions seed by seed: those of a seed share data order, noise and starts."""
    better, worse = (_last(micro, condition, FD) for condition in (claim.better, claim.worse))
    gains = [worse[seed] - better[seed] for seed in sorted(better.keys() & worse.keys())]
    found: dict[str, Any] = {"claim": claim.told, "where": claim.where, "gains": gains}
    if len(gains) < 2:
        return found | {"verdict": "not finished"}
    mean, freedom = fmean(gains), len(gains) - 1
    margin = _STUDENT_95[min(freedom, len(_STUDENT_95)) - 1] * stdev(gains) / math.sqrt(len(gains))
    verdict = "not told apart"
    if abs(mean) > margin:
        verdict = "seen" if mean > 0 else "the opposite"
    return found | {"verdict": verdict, "mean_gain": mean, "margin_95": margin}


def table(micro: Micro) -> str:
    """Return the results as Markdown."""
    real, base = results(micro)["real"], micro.base
    count = base.evaluation.num_samples
    lines = [
        f"| condition | `{FD}` | `{PIXEL_FD}` | held-out loss | legibility | seeds |",
        "|---|---|---|---|---|---|",
        *(_line(micro, condition) for condition in micro.conditions),
    ]
    if real:
        lines.append(
            f"| real pictures | {real[FD]:.2f} | {real[PIXEL_FD]:.2f} | "
            f"| {real[LEGIBILITY]:.1%} | |"
        )
    model, train = base.model, base.train
    lines += [
        "",
        f"{model.title}, patches of {getattr(model, 'patch_size', '-')}, "
        f"{model.input_size}x{model.input_size}; {train.max_steps:,} steps of "
        f"{train.global_batch_size} at a learning rate of {train.lr:g}; {count:,} samples a "
        f"number, "
        f"{base.evaluation.sampler} with {base.evaluation.num_sampling_steps} steps, guidance "
        f"{base.evaluation.cfg_scale:g}. Mean and standard deviation over seeds.",
    ]
    return "\n".join(lines)


def _line(micro: Micro, condition: str) -> str:
    cells = [CONDITIONS[condition].label]
    for metric, form in ((FD, ".2f"), (PIXEL_FD, ".2f"), (LOSS, ".5f"), (LEGIBILITY, ".1%")):
        cells.append(_spread(list(_last(micro, condition, metric).values()), form))
    cells.append(f"{len(_last(micro, condition, FD))} of {micro.num_seeds}")
    return f"| {' | '.join(cells)} |"


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    deviation = f" ± {stdev(values):{form}}" if len(values) > 1 else ""
    return f"{fmean(values):{form}}{deviation}"


def verdicts(micro: Micro) -> str:
    """Return what the paper says, and whether it is seen here, as Markdown."""
    lines = ["| the paper says | | here | gain in FD, 95% interval |", "|---|---|---|---|"]
    for each in results(micro)["claims"]:
        interval = ""
        if "mean_gain" in each:
            interval = f"{each['mean_gain']:+.2f} ± {each['margin_95']:.2f}"
        lines.append(f"| {each['claim']} | {each['where']} | {each['verdict']} | {interval} |")
    return "\n".join(lines)


def write_report(micro: Micro) -> list[Path]:
    """Write the table, the numbers, the figure and a sheet of samples; return their paths."""
    found = results(micro)
    folder = open_folder(micro.out)
    text = "\n\n".join([table(micro), verdicts(micro), _CAUTION.format(seeds=micro.num_seeds)])
    folder.write_bytes(TABLE, f"{text}\n".encode())
    folder.write_bytes(NUMBERS, json.dumps(found, indent=2).encode() + b"\n")
    charts = [
        _chart(micro, f"{FD}, {found['num_samples']:,} samples", FD, found["real"].get(FD)),
        _chart(micro, "held-out loss, mse + vb", LOSS, None),
    ]
    if any(chart.curves for chart in charts):
        picture = drawings_png(charts, _BELOW.format(seeds=micro.num_seeds), columns=2)
        folder.write_bytes(FIGURE, picture)
    _write_sheet(micro)
    written = [micro.out / name for name in (TABLE, NUMBERS, FIGURE, SHEET)]
    return [path for path in written if path.exists()]


_CAUTION = """"Seen" means that the 95% interval of the difference between seeds lies on the side \
that the paper says ({seeds} seeds, compared seed by seed: the same order of data, the same noise \
of training and of samples). This is one small network and one data set of small grey pictures, \
trained for minutes. It shows whether the ordering holds there. It does not show the paper's \
figures, which are of networks of 33M to 458M parameters, 100,000 to 2,000,000 steps and \
Inception's features; `fd_efficientnet` is no FID."""


_ENLARGED, _MARGIN, _FONT_PIXELS = 2, 190, 17  # of the sheet of samples
_BELOW = "Mean over up to {seeds} seeds, and their standard deviation."


def _chart(micro: Micro, title: str, metric: str, floor: float | None) -> Chart:
    batch = micro.base.train.global_batch_size
    x = np.array([float(batch * step) for step in micro.points])
    curves = []
    for index, condition in enumerate(micro.conditions):
        y = np.full((micro.num_seeds, len(micro.points)), np.nan)
        for seed in range(micro.num_seeds):
            measured = micro.measured(MicroRun(condition, seed))
            for place, step in enumerate(micro.points):
                y[seed, place] = measured.get(step, {}).get(metric, np.nan)
        known = np.isfinite(y).any(axis=0)
        if known.any():
            of_seeds = y[:, known]
            deviation = np.nan_to_num(np.nanstd(of_seeds, axis=0))
            curves.append(Curve(index, x[known], np.nanmean(of_seeds, axis=0), deviation))
    names = [CONDITIONS[condition].label for condition in micro.conditions]
    if floor is not None and curves:
        names.append("real pictures")
        curves.append(Curve(len(names) - 1, x, np.full(len(x), floor)))
    return Chart(
        title, curves, axis="samples_seen", log=True, points=True, spread=True, names=names
    )


def _write_sheet(micro: Micro) -> None:
    """Put the first samples of each condition below each other, those of seed 0 at the end."""
    from PIL import Image, ImageDraw, ImageFont

    name = f"step_{micro.points[-1]:08d}.png"
    grids = {}
    for condition in micro.conditions:
        path = micro.run_dir(MicroRun(condition, 0)) / SAMPLES / name
        if path.exists():
            with Image.open(path) as picture:
                # Two of the four rows.
                rows = picture.crop((0, 0, picture.width, picture.height // 2))
            grids[CONDITIONS[condition].label] = rows
    if not grids:
        return
    width, height = next(iter(grids.values())).size
    sheet = Image.new("L", (_MARGIN + width, height * len(grids)), 255)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PIXELS)
    for index, (label, grid) in enumerate(grids.items()):
        sheet.paste(grid, (_MARGIN, index * height))
        middle = index * height + height // 2
        draw.text((_MARGIN - 12, middle), label, fill=0, font=font, anchor="rm")
    write_whole(micro.out / SHEET, lambda file: sheet.save(file, format="PNG"))
