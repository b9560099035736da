"""Draw one run: its losses, speed and method, a PNG each and a sheet of all."""

from pathlib import Path

from dtr_scale.config.load import load_experiment
from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.comparison.plots import Drawing, drawings_png
from dtr_scale.evaluation.comparison.record import RunRecord
from dtr_scale.evaluation.comparison.single import run_charts
from dtr_scale.evaluation.comparison.tables import number
from dtr_scale.jobs.method import method_drawings
from dtr_scale.jobs.recorded import read_run_dir
from dtr_scale.jobs.trained import check_output
from dtr_scale.storage.folder import open_folder
from dtr_scale.train.run_dir import CONFIG

PLOTS, SHEET = "plots", "sheet.png"
_COLUMNS = 3


def plot_run(run_dir: Path, *, out: Path | None = None) -> list[Path]:
    """Draw a run, finished or not, into a folder; return the paths of the PNGs, the sheet last."""
    folder = out or run_dir / PLOTS
    run = read_run_dir(run_dir)
    check_output(folder, "")
    drawings: dict[str, Drawing] = {**run_charts(run), **_method(run_dir, run)}
    below = _described(run)
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{name}.png": drawings_png([each], below) for name, each in drawings.items()}
    files[SHEET] = drawings_png(list(drawings.values()), below, columns=_COLUMNS)
    for name, content in files.items():
        open_folder(folder).write_bytes(name, content)
    return [folder / name for name in files]


def _described(run: RunRecord) -> str:
    hours = run.column("gpu_hours")
    spent = "" if hours is None else f", {number(float(hours[-1]))} GPU hours"
    return f"{run.name}: step {run.step:,} of {run.max_steps:,}{spent}"


def _method(run_dir: Path, run: RunRecord) -> dict[str, Drawing]:
    try:
        experiment = load_experiment(run_dir / CONFIG)
    except ConfigError:  # of an older version: what was recorded is drawn all the same
        return {}
    return method_drawings(experiment, run)
