"""Draw one run: its losses, clusters, speed and routing, a PNG each and a sheet of all."""

from collections.abc import Mapping
from pathlib import Path

import torch

from dtr_scale.config.load import load_experiment
from dtr_scale.errors import ConfigError
from dtr_scale.evaluation.comparison.plots import Drawing, Mask, drawings_png
from dtr_scale.evaluation.comparison.record import RunRecord
from dtr_scale.evaluation.comparison.single import run_charts
from dtr_scale.evaluation.comparison.tables import number
from dtr_scale.jobs.recorded import read_run_dir
from dtr_scale.jobs.trained import check_output
from dtr_scale.models.build import build_network
from dtr_scale.models.routing import Routing, routing_mask
from dtr_scale.storage.folder import open_folder
from dtr_scale.train.run_dir import CONFIG

PLOTS, SHEET = "plots", "sheet.png"
_COLUMNS = 3
_MOST_MASKS = 3


def plot_run(run_dir: Path, *, out: Path | None = None) -> list[Path]:
    """Draw a run, finished or not, into a folder; return the paths of the PNGs, the sheet last."""
    folder = out or run_dir / PLOTS
    run = read_run_dir(run_dir)
    check_output(folder, "")
    drawings: dict[str, Drawing] = {**run_charts(run), **_masks(run_dir, run)}
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


def _masks(run_dir: Path, run: RunRecord) -> Mapping[str, Mask]:
    """Return the masks of the first block of each width; {} without routing."""
    try:
        experiment = load_experiment(run_dir / CONFIG)
    except ConfigError:  # of an older version: what was recorded is drawn all the same
        return {}
    routing = experiment.model.routing
    if routing.type == "none":
        return {}
    with torch.device("meta"):
        network = build_network(
            **experiment.model.model_dump(), num_timesteps=experiment.diffusion.num_timesteps
        )
    found: dict[int, int] = {}
    for module in network.modules():
        if isinstance(module, Routing):
            for block, width in zip(module.blocks, module.widths, strict=True):
                found.setdefault(width, block)
    masks = {}
    for width, block in list(found.items())[:_MOST_MASKS]:
        mask = routing_mask(
            routing.type,
            experiment.diffusion.num_timesteps,
            width,
            routing.alpha,
            routing.beta,
            seed=routing.seed,
            block=block,
            step=max(run.step - 1, 0),
            update_every_steps=routing.update_every_steps,
            num_clusters=routing.num_clusters,
        )
        name = "routing" if not masks else f"routing_{width}"
        masks[name] = Mask(f"Routing {routing.type}, block {block}: {width} channels", mask.numpy())
    return masks
