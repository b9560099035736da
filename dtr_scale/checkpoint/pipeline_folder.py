"""Write a network as a folder that diffusers loads as a pipeline, with the code that it needs."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from dtr_scale.checkpoint import pipeline
from dtr_scale.checkpoint.pipeline_network import PipelineNetwork, pipeline_network
from dtr_scale.checkpoint.weights import write_safetensors
from dtr_scale.errors import CheckpointError
from dtr_scale.models.denoiser import Denoiser

_CODE = Path(pipeline.__file__).parent
_VERSION = "0.42.0"
"""Of diffusers: the oldest that it was written for."""


@dataclass(frozen=True)
class PipelineSettings:
    """How a pipeline samples where its caller does not say; names as in `evaluation`."""

    betas: Sequence[float]
    """Of all training timesteps."""
    sampler: str
    num_sampling_steps: int | str
    eta: float = 0.0
    clip_denoised: bool = False
    cfg_scale: float = 1.0
    cfg_channels: int | None = None
    cfg_interval: Sequence[int] | None = None
    id2label: Mapping[int, str] = field(default_factory=dict)
    vae_name: str | None = None
    """An autoencoder of the hub, which is fetched when it is needed; None for pixels."""


def write_pipeline(
    network: Denoiser,
    section: Mapping[str, Any],
    folder: Path,
    settings: PipelineSettings,
    *,
    card: str,
    header: Mapping[str, str] | None = None,
    mask_step: int = 0,
    save_vae: Callable[[Path], object] | None = None,
    null_context: Tensor | None = None,
) -> None:
    """Write a network as a pipeline folder, whole or not at all.

    `section` is the network's `model` section with all defaults, `card` the folder's README.md,
    `header` the weights' metadata. `mask_step` is the training step whose masks are taken where
    they roam. `save_vae` writes the autoencoder into a folder. `null_context` [L, D] is the text
    that stands for none, of a network of texts. Raises ConfigError for a network that no code of a
    pipeline computes, CheckpointError if the folder cannot be written.
    """
    described = pipeline_network(
        network,
        section,
        num_timesteps=len(settings.betas),
        mask_step=mask_step,
        null_context=null_context,
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as directory:
            made = Path(directory) / folder.name
            _write_network(described, made / "transformer", header)
            _write_scheduler(network, made / "scheduler", settings)
            if save_vae:
                save_vae(made / "vae")
            _write_index(made, described, settings, has_vae=save_vae is not None)
            readme = made / "README.md"
            readme.write_text(card, encoding="utf-8")
            for path in made.rglob("*.*"):
                path.chmod(readme.stat().st_mode)  # safetensors' is for their owner alone
            made.replace(folder)  # which may be there, but empty
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}; choose another place"
        ) from None


def _write_network(
    network: PipelineNetwork, folder: Path, header: Mapping[str, str] | None
) -> None:
    folder.mkdir(parents=True)
    layout = {"layout": f"{network.module}.py, for diffusers", **(header or {})}
    write_safetensors(network.weights, folder / "diffusion_pytorch_model.safetensors", layout)
    _write_component(folder, network.module, network.class_name, "config.json", network.config)


def _write_scheduler(network: Denoiser, folder: Path, settings: PipelineSettings) -> None:
    config = {
        "num_train_timesteps": len(settings.betas),
        "trained_betas": list(settings.betas),
        "learn_sigma": network.learn_sigma,
        "sampler": settings.sampler,
        "eta": settings.eta,
        "clip_sample": settings.clip_denoised,
        "prediction_type": "epsilon",
    }
    folder.mkdir(parents=True)
    _write_component(folder, "dtr_scheduler", "DTRScheduler", "scheduler_config.json", config)


def _write_index(
    folder: Path, network: PipelineNetwork, settings: PipelineSettings, *, has_vae: bool
) -> None:
    index = {
        "transformer": [network.module, network.class_name],
        "scheduler": ["dtr_scheduler", "DTRScheduler"],
        "vae": ["diffusers", "AutoencoderKL"] if has_vae else [None, None],
        "vae_name": None if has_vae else settings.vae_name,
        "id2label": {str(label): name for label, name in settings.id2label.items()},
        "guidance_scale": settings.cfg_scale,
        "guidance_channels": settings.cfg_channels,
        "guidance_interval": settings.cfg_interval,
        "num_inference_steps": settings.num_sampling_steps,
    }
    _write_component(
        folder, "dtr_pipeline", ["dtr_pipeline", "DTRPipeline"], "model_index.json", index
    )


def _write_component(
    folder: Path, module: str, class_name: str | list[str], name: str, config: Mapping[str, Any]
) -> None:
    shutil.copyfile(_CODE / f"{module}.py", folder / f"{module}.py")
    described = {"_class_name": class_name, "_diffusers_version": _VERSION, **config}
    (folder / name).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
