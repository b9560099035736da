"""Draw samples of a trained run into pictures or latents, with a manifest beside them."""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from dtr_scale.engines.world import World
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.evaluation.stored import StoredBatches
from dtr_scale.jobs.averages import Choice
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.conditions import Conditions, Wanted, conditions_of
from dtr_scale.jobs.drawing import Drawing, draw_stored
from dtr_scale.jobs.ranks import Ranks, joined_ranks
from dtr_scale.jobs.sample_files import Asked, default_name, write_files
from dtr_scale.jobs.trained import TrainedRun, check_output, load_run
from dtr_scale.prepare.encode import PictureEncoder, PixelEncoder, autoencoder, decoder_of
from dtr_scale.signals import LeaveRequest
from dtr_scale.train.run_dir import SAMPLES

log = logging.getLogger(__name__)

NUM_SAMPLES = 64
_SHEET_COLUMNS = 8  # of a sheet of scales of guidance, about


def sample_run(
    run_dir: Path,
    *,
    num_samples: int | None = None,
    out: Path | None = None,
    folder: Path | None = None,
    latents: bool = False,
    vae: str | None = None,
    choice: Choice | None = None,
    wanted: Wanted | None = None,
    seed: int | None = None,
    guidance: Sequence[float] = (),
    force: bool = False,
    overrides: Sequence[str] = (),
    leave: LeaveRequest | None = None,
) -> Path:
    """Draw samples 0 to `num_samples` (64) of a run; return the path of `out`.

    An .npz holds pictures as ADM's do (`arr_0`, and `arr_1` the labels of classes), with a picture
    of the first ones beside it, or with `latents` x_start as `latents`; a .png shows all of them.
    FILE.json beside either is the manifest. `folder` is for one picture each. Without `out` it is
    `samples/step_STEP_grid.png` of the run, or `..._latents.npz` if nothing here decodes them.
    With scales of `guidance` it is one sheet, a row of the same samples for each scale.

    Latents are decoded by the autoencoder that made the data, if it is on this disk, or by `vae`.
    `overrides` are those of evaluation, `seed` that of the noise (by default the run's). Under a
    launcher all ranks draw and rank 0 writes. Where a job was killed the next one goes on, with the
    checkpoint that `out` was begun with. What is finished is left as it is: other settings are a
    ConfigError, unless `force` overwrites it. `leave` is that of `joined_ranks`. Raises
    UnfinishedError where this one is asked to leave.
    """
    asked = Asked(out, folder, latents, force)
    wanted, choice = wanted or Wanted(), choice or Choice()
    with joined_ranks(leave) as ranks:
        world = ranks.world
        with world.agree():
            asked.check(guidance)
        run = seeded(_load(run_dir, overrides, choice, out, world), seed)
        with world.agree():
            decoder = None
            if not latents:
                needed = asked.needs_pictures or bool(guidance)
                decoder = decoder_of_run(run, vae, world.device, needed=needed)
            conditions = conditions_of(run.experiment, wanted, world.device)
            count = num_samples or _default_count(conditions, guidance)
            _check_guidance(run, guidance, count)
        # All or none: whoever draws a batch, it is of the same kind.
        if not all(world.all_gather_object(decoder is not None)):
            decoder = None
        drawing = Drawing(run, count, conditions, decoder, tuple(guidance))
        path = out or run_dir / SAMPLES / _name(drawing, wanted, choice, seed)
        _draw_unless_finished(drawing, path, asked, ranks)
    return path


def _draw_unless_finished(drawing: Drawing, path: Path, asked: Asked, ranks: Ranks) -> None:
    """Draw what of a drawing is missing, and write its files, on all ranks together."""
    world = ranks.world
    stored = _stored(drawing, path)
    manifest: dict[str, Any] = {}
    is_finished = False
    with closing(stored):
        with world.agree():
            check_output(path, path.suffix)
            if world.is_main:
                manifest = drawing.manifest(world.device)
                is_finished = asked.is_finished(path, manifest)
                if not is_finished:
                    if asked.out is None:
                        stored.forget_others(manifest)
                    stored.begin(manifest)
        if world.broadcast_object(is_finished):
            if world.is_main:
                log.info("%s is finished, of these settings; --force draws it again", path)
            ranks.part(None)
            return
        draw_stored(drawing, stored, ranks)
        if world.is_main:
            write_files(drawing, stored, path, asked.folder, manifest, ranks)


def seeded(run: TrainedRun, seed: int | None) -> TrainedRun:
    """Return a run whose samples begin as the noise of another seed."""
    if seed is None:
        return run
    train = run.experiment.train.model_copy(update={"seed": seed})
    return run._replace(experiment=run.experiment.model_copy(update={"train": train}))


def _default_count(conditions: Conditions, guidance: Sequence[float]) -> int:
    if not guidance:
        return NUM_SAMPLES
    period = conditions.titles.period if conditions.titles else 0
    if not 1 < period <= 2 * _SHEET_COLUMNS:
        return _SHEET_COLUMNS
    return period * max(1, _SHEET_COLUMNS // period)  # each as often as the others


def _check_guidance(run: TrainedRun, guidance: Sequence[float], count: int) -> None:
    batch_size = run.experiment.evaluation.batch_size
    if guidance and count > batch_size:
        raise ConfigError(
            f"--guidance shows a row of {count} samples for each scale, which is more than "
            f"evaluation.batch_size = {batch_size}; give a smaller --num-samples"
        )


def _name(drawing: Drawing, wanted: Wanted, choice: Choice, seed: int | None) -> str:
    """Return the name of a file that is asked for without one."""
    kind = "guidance" if drawing.guidance else "grid" if drawing.decoder else "latents"
    told = [f"classes_{'_'.join(wanted.classes)}"] if wanted.classes else []
    if wanted.prompts:
        told.append("_".join(wanted.prompts))
    if wanted.captions is not None:
        told.append(wanted.captions.stem)
    if choice.ema is not None:
        told.append(f"ema_{choice.ema}")
    if choice.sigma_rel is not None:
        told.append(f"sigma_rel_{choice.sigma_rel:g}")
    if seed is not None:
        told.append(f"seed_{seed}")
    suffix = ".png" if drawing.decoder else ".npz"
    return default_name(kind, drawing.run.step, told) + suffix


def _stored(drawing: Drawing, path: Path) -> StoredBatches:
    """Return where a drawing's batches are kept; of a sheet each is a row."""
    count, batch_size = drawing.num_samples, drawing.run.experiment.evaluation.batch_size
    if drawing.guidance:
        count, batch_size = count * len(drawing.guidance), count
    return StoredBatches(_parts(path), count, batch_size)


def _parts(path: Path) -> Path:
    return path.with_name(f"{path.name}.parts")


def _load(
    run_dir: Path, overrides: Sequence[str], choice: Choice, out: Path | None, world: World
) -> TrainedRun:
    """Load a run, as the checkpoint has it that an unfinished `out` was begun with.

    The run may have trained on since, and the same command has to go on.
    """
    begun = StoredBatches(_parts(out), 1, 1).unfinished_manifest() if out else None
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


def decoder_of_run(
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
