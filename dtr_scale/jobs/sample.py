"""Draw samples of a trained run into pictures or latents, with a manifest beside them."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.evaluation.pictures import ARRAY, rgb, write_npz, write_pngs
from dtr_scale.evaluation.sampling import grid_columns, sample_labels, save_level_grid
from dtr_scale.evaluation.stored import StoredBatches
from dtr_scale.jobs.averages import Choice
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.conditions import Captions, conditions_of
from dtr_scale.jobs.drawing import Drawing, checked, draw_stored
from dtr_scale.jobs.ranks import Ranks, joined_ranks
from dtr_scale.jobs.sampling import sampling_settings
from dtr_scale.jobs.trained import TrainedRun, check_output, load_run
from dtr_scale.prepare.encode import PictureEncoder, PixelEncoder, autoencoder, decoder_of
from dtr_scale.signals import LeaveRequest
from dtr_scale.storage.folder import open_folder
from dtr_scale.storage.local import replacing
from dtr_scale.train.run_dir import SAMPLES

log = logging.getLogger(__name__)

_GRID_ROWS = 8
"""Of the picture beside an .npz, which may hold 50,000 samples."""


def sample_run(
    run_dir: Path,
    *,
    num_samples: int,
    out: Path | None = None,
    pngs: Path | None = None,
    latents: bool = False,
    vae: str | None = None,
    choice: Choice | None = None,
    captions: Captions | None = None,
    overrides: Sequence[str] = (),
    leave: LeaveRequest | None = None,
) -> Path:
    """Draw samples 0 to `num_samples` of a run; return the path of `out`.

    An .npz holds pictures as ADM's do (`arr_0`, and `arr_1` the labels of classes), with a picture
    of the first ones beside it, or with `latents` x_start as `latents`; a .png shows all of them.
    FILE.json beside either is the manifest. `pngs` is a folder for one picture each. Without `out`
    it is `samples/grid.png` of the run, or `latents.npz` if nothing here decodes them.

    Latents are decoded by the autoencoder that made the data, if it is on this disk, or by `vae`.
    `overrides` are those of evaluation. Under a launcher all ranks draw and rank 0 writes. Where a
    job was killed the next one goes on, with the checkpoint that `out` was begun with. `leave` is
    that of `joined_ranks`. Raises UnfinishedError where this one is asked to leave.
    """
    with joined_ranks(leave) as ranks:
        world = ranks.world
        with world.agree():
            _check_outputs(out, pngs, latents)
        run = _load(run_dir, overrides, choice or Choice(), out, world)
        with world.agree():
            needed = out is not None or pngs is not None
            decoder = None if latents else _decoder(run, vae, world.device, needed=needed)
            conditions = conditions_of(run.experiment, captions, world.device)
        if not all(world.all_gather_object(decoder is not None)):
            decoder = None
        path = out or run_dir / SAMPLES / ("grid.png" if decoder else "latents.npz")
        drawing = Drawing(run, num_samples, conditions, decoder)
        stored = _stored(path, num_samples, run.experiment.evaluation.batch_size)
        manifest: dict[str, Any] = {}
        with closing(stored):
            with world.agree():
                check_output(path, path.suffix)
                if world.is_main:
                    manifest = drawing.manifest(world.device)
                    if out is None:
                        stored.forget_others(manifest)
                    stored.begin(manifest)
            draw_stored(drawing, stored, ranks)
            if world.is_main:
                _write(drawing, stored, path, pngs, manifest, ranks)
    return path


def _check_outputs(out: Path | None, pngs: Path | None, latents: bool) -> None:
    # Before samples are drawn, which takes the time.
    if out is not None:
        if out.suffix not in (".png", ".npz"):
            raise ConfigError(f"--out={out} is not accepted; give a file that ends in .npz or .png")
        check_output(out, out.suffix)
    if latents and (pngs is not None or (out is not None and out.suffix != ".npz")):
        raise ConfigError("--latents are no pictures; give --out FILE.npz, and no --pngs")
    if pngs is not None and pngs.exists() and not (pngs.is_dir() and not any(pngs.iterdir())):
        raise ConfigError(f"--pngs={pngs} is there and not empty; give a new folder")


def _stored(path: Path, num_samples: int, batch_size: int) -> StoredBatches:
    return StoredBatches(path.with_name(f"{path.name}.parts"), num_samples, batch_size)


def _load(
    run_dir: Path, overrides: Sequence[str], choice: Choice, out: Path | None, world: World
) -> TrainedRun:
    """Load a run, as the checkpoint has it that an unfinished `out` was begun with.

    The run may have trained on since, and the same command has to go on.
    """
    begun = _stored(out, 1, 1).unfinished_manifest() if out else None
    if begun is None or choice.step is not None or len(begun["checkpoints"]) != 1:
        return load_run(run_dir, overrides, choice, world)
    log.info("%s was begun with the checkpoint of step %d", out, begun["step"])
    try:
        return load_run(run_dir, overrides, choice._replace(step=begun["step"]), world)
    except ConfigError as error:
        if not str(error).startswith("--step="):  # what the user gave is wrong
            raise
        raise ConfigError(
            f"{error}; {out} was begun with it: remove {out}.parts to draw with another"
        ) from None


def _decoder(
    run: TrainedRun, vae: str | None, device: torch.device, *, needed: bool
) -> PictureEncoder | None:
    """Return what makes pictures of samples; None where there is nothing unless it is `needed`."""
    data, network = run.experiment.data, run.network
    vae = vae or run.experiment.evaluation.vae
    if vae is not None:
        return autoencoder(vae, network.in_channels, device)
    # Grey and RGB pixels need no decoder.
    as_they_are = None
    if network.in_channels in (1, 3):
        as_they_are = PixelEncoder(network.input_size, network.in_channels)
    try:
        if data.type == "synthetic":
            raise ConfigError(
                "made-up data has no decoder; give --vae NAME_OR_FOLDER, or --latents"
            )
        return decoder_of(open_samples(run.experiment).manifest, None, device)
    except (ConfigError, DataError) as error:
        if as_they_are:
            if data.type != "synthetic":
                channels = network.in_channels
                log.info("samples of %d channels are shown as pixels: %s", channels, error)
            return as_they_are
        if needed:
            raise
        log.info("samples are not decoded: %s", error)
        return None


def _write(
    drawing: Drawing,
    stored: StoredBatches,
    path: Path,
    pngs: Path | None,
    manifest: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Write all files whole or not at all, then remove the stored batches."""
    run, count = drawing.run, stored.num_samples
    num_classes = run.network.num_classes
    columns = grid_columns(num_classes)
    labels = None
    if run.network.conditioning == "class":
        labels = sample_labels(sampling_settings(run.experiment), range(count), num_classes).numpy()
    if path.suffix == ".npz":
        shape = next(iter(stored)).shape[1:]
        batches = checked(stored, ranks)
        with replacing(path) as temporary, temporary.open("wb") as file:
            if drawing.decoder is None:
                write_npz(file, batches, (count, *shape), "float32", labels, name="latents")
            else:
                pictures = (rgb(batch) for batch in batches)
                write_npz(file, pictures, (count, *shape[:2], 3), "uint8", labels, name=ARRAY)
            file.flush()
            os.fsync(file.fileno())
    if drawing.decoder is not None:
        shown = count if path.suffix == ".png" else _GRID_ROWS * columns
        levels = torch.from_numpy(stored.first(shown)).permute(0, 3, 1, 2)
        with replacing(path.with_suffix(".png")) as temporary, temporary.open("wb") as file:
            save_level_grid(file, levels, columns=columns)
    content = json.dumps(manifest, indent=2) + "\n"
    open_folder(path.parent).write_bytes(path.with_suffix(".json").name, content.encode())
    if pngs is not None:
        _write_pngs(pngs, stored, ranks)
    stored.remove()


def _write_pngs(folder: Path, stored: StoredBatches, ranks: Ranks) -> None:
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    write_pngs(unfinished, checked(stored, ranks))
    if folder.exists():
        folder.rmdir()  # empty, as was looked at first
    unfinished.rename(folder)
