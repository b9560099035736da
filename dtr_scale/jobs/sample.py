"""Draw samples of a trained run into a picture."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from dtr_scale.errors import ConfigError, DataError
from dtr_scale.evaluation.sampling import grid_columns, save_grid
from dtr_scale.jobs.build import open_samples
from dtr_scale.jobs.trained import TrainedRun, check_output, draw, load_run, write_whole
from dtr_scale.prepare.encode import autoencoder, decoder_of
from dtr_scale.train.run_dir import SAMPLES

log = logging.getLogger(__name__)


def sample_run(
    run_dir: Path,
    *,
    num_samples: int,
    out: Path | None = None,
    vae: str | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Draw samples 0 to `num_samples` of a run into one picture; return its path.

    Latents are decoded by the autoencoder that made the data, if it is on this disk, or by `vae`;
    otherwise, or where `out` is an .npz, they are stored. `overrides` are those of evaluation.
    """
    run = load_run(run_dir, overrides)
    decode = None if out and out.suffix == ".npz" else _decoder(run, vae, needed=out is not None)
    path = out or run_dir / SAMPLES / ("grid.png" if decode else "latents.npz")
    # Before samples are drawn, which takes the time.
    check_output(path, ".png" if decode else ".npz")
    images = draw(run, num_samples)
    if decode:
        columns = grid_columns(run.network.num_classes)
        pictures = decode(images)
        write_whole(path, lambda file: save_grid(file, pictures, columns=columns))
    else:
        write_whole(path, lambda file: np.savez(file, latents=images.numpy()))
    return path


_Decode = Callable[[Tensor], Tensor]


def _decoder(run: TrainedRun, vae: str | None, *, needed: bool) -> _Decode | None:
    """Return what makes pictures of samples; None where there is nothing unless it is `needed`."""
    data, channels = run.experiment.data, run.network.in_channels
    device = next(run.network.parameters()).device
    if vae is not None:
        return autoencoder(vae, channels, device).decode
    # Grey and RGB pixels need no decoder.
    shown_as_they_are = (lambda images: images) if channels in (1, 3) else None
    if data.type == "synthetic":
        return shown_as_they_are
    try:
        return decoder_of(open_samples(run.experiment).manifest, None, device).decode
    except (ConfigError, DataError) as error:
        if shown_as_they_are:
            log.info("samples of %d channels are shown as pixels: %s", channels, error)
            return shown_as_they_are
        if needed:
            raise
        log.info("samples are not decoded: %s", error)
        return None
