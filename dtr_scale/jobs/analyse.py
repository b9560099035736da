"""Compare what a trained network does at different timesteps: its CKA, and its gradients."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtr_scale.config.schema import Experiment
from dtr_scale.data.order import GlobalOrder
from dtr_scale.data.reader import Samples
from dtr_scale.diffusion.clusters import affinity_clusters
from dtr_scale.errors import ConfigError, DataError
from dtr_scale.evaluation.cka import timestep_cka
from dtr_scale.evaluation.heatmaps import save_heatmaps
from dtr_scale.jobs.build import build_diffusion, open_samples
from dtr_scale.jobs.trained import TrainedRun, check_output, load_run, write_whole
from dtr_scale.logs import watched
from dtr_scale.objectives.affinity import gradient_affinity
from dtr_scale.train.run_dir import SAMPLES


def cka_run(
    run_dir: Path,
    *,
    num_samples: int,
    num_timesteps: int,
    out: Path | None = None,
    debiased: bool = True,
) -> tuple[Path, Path]:
    """Compare a run's representations between evenly spread timesteps, block by block.

    The samples are held-out ones, or training ones where there are no others. Returns the paths of
    a picture and, beside it, of the numbers: an .npz with cka [depth, S, S], timesteps [S] and a
    manifest in JSON.
    """
    picture = out or run_dir / SAMPLES / "cka.png"
    check_output(picture, ".png")
    run = load_run(run_dir)
    timesteps = _spread(num_timesteps, run.experiment.diffusion.num_timesteps)
    samples, split = _open_held_out(run.experiment)
    x_start, y = _read(run, samples, num_samples)
    cka = timestep_cka(
        run.network,
        build_diffusion(run.experiment),
        x_start,
        y,
        watched(timesteps.tolist(), "timesteps", len(timesteps)),
        seed=run.experiment.train.seed,
        step=run.mask_step,
        debiased=debiased,
    ).numpy()
    titles = [f"block {block}" for block in range(len(cka))]
    label = "linear CKA, debiased" if debiased else "linear CKA"
    write_whole(
        picture,
        lambda file: save_heatmaps(file, cka, timesteps.tolist(), titles=titles, label=label),
    )
    manifest = _manifest(run, samples, split, len(x_start)) | {"debiased": debiased}
    return picture, _save(picture, manifest, cka=cka, timesteps=timesteps)


def affinity_run(
    run_dir: Path, *, num_samples: int, num_timesteps: int, num_clusters: int
) -> tuple[dict[str, Any], tuple[Path, Path]]:
    """Cut a run's timesteps into clusters by the affinity of their gradients (ANT).

    Measured at evenly spread timesteps on training samples. Returns what goes into the experiment's
    objective to train with the clusters, and the paths of a picture of the affinity and of the
    numbers: an .npz with affinity [T, T], boundaries [K + 1], timesteps [S] and a manifest in JSON.
    """
    run = load_run(run_dir)
    timesteps = _spread(num_timesteps, run.experiment.diffusion.num_timesteps)
    samples = open_samples(run.experiment)
    x_start, y = _read(run, samples, num_samples)
    # In batches that training's backward had room for.
    size = run.experiment.train.micro_batch_size
    batches = list(zip(x_start.split(size), y.split(size), strict=True))
    affinity = gradient_affinity(
        run.network,
        build_diffusion(run.experiment),
        watched(batches, "batches", len(batches)),
        timesteps.tolist(),
        seed=run.experiment.train.seed,
        step=run.mask_step,
    )
    boundaries = affinity_clusters(affinity, num_clusters)
    picture = run_dir / SAMPLES / "affinity.png"
    write_whole(
        picture,
        lambda file: save_heatmaps(
            file,
            affinity[None],
            list(range(len(affinity))),
            titles=[f"task affinity, {num_clusters} clusters"],
            label="cosine of gradients",
            limits=(-1.0, 1.0),
            boundaries=boundaries[1:-1].tolist(),
        ),
    )
    manifest = _manifest(run, samples, "train", len(x_start))
    arrays = {"affinity": affinity, "boundaries": boundaries, "timesteps": timesteps}
    objective = {
        "type": "ant_uw",
        "num_clusters": num_clusters,
        "clusters": "gradient",
        "boundaries": boundaries.tolist(),
    }
    return objective, (picture, _save(picture, manifest, **arrays))


def _spread(count: int, num_timesteps: int) -> np.ndarray:
    """Return `count` timesteps from the first to the last, int64."""
    if not 2 <= count <= num_timesteps:
        raise ConfigError(
            f"--num-timesteps={count} is not accepted; give 2 to {num_timesteps}, "
            "the run's diffusion.num_timesteps"
        )
    return np.linspace(0, num_timesteps - 1, count).round().astype(np.int64)


def _open_held_out(experiment: Experiment) -> tuple[Samples, str]:
    if experiment.data.type != "synthetic":
        try:
            return open_samples(experiment, "val"), "val"
        except DataError:
            pass  # there is no such split; what else is wrong is wrong with "train" as well
    return open_samples(experiment), "train"


def _read(run: TrainedRun, samples: Samples, num: int) -> tuple[Tensor, Tensor]:
    """Return x_start [n, C, H, W] and y [n, ...] of up to `num` samples, mixed as in training."""
    order = GlobalOrder(samples.shard_samples, run.experiment.train.seed)
    located = order.samples(range(min(num, order.num_samples)))
    stored = [samples.read(*place) for place in located.tolist()]
    samples.close()
    decode = samples.manifest.decode
    x_start = np.stack([decode(array) for array, _ in stored])
    y = torch.from_numpy(np.stack([condition for _, condition in stored]))
    if run.network.conditioning == "none":
        y = torch.zeros(len(y), dtype=torch.int64)
    device = next(run.network.parameters()).device
    return torch.from_numpy(x_start).to(device), y.to(device)


def _manifest(run: TrainedRun, samples: Samples, split: str, num_samples: int) -> dict[str, Any]:
    return {
        "checkpoints": run.checkpoints,
        "step": run.step,
        "split": split,
        "manifest_hash": samples.manifest.hash(split),
        "num_samples": num_samples,
        "seed": run.experiment.train.seed,
    }


def _save(picture: Path, manifest: dict[str, Any], **arrays: Any) -> Path:  # noqa: ANN401
    """Write arrays beside a picture; return where."""
    path = picture.with_suffix(".npz")
    # As an array of text, which `np.load` reads without pickle.
    described = np.array(json.dumps(manifest))
    write_whole(path, lambda file: np.savez(file, **arrays, manifest=described))
    return path
