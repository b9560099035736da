"""Write a DiT as a folder that diffusers loads as a pipeline, with the code that it needs."""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtr_scale.checkpoint import pipeline
from dtr_scale.checkpoint.weights import write_safetensors
from dtr_scale.errors import CheckpointError, ConfigError
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.dit import DiT

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

    `card` is its README.md, `header` the weights' metadata, `mask_step` the training step whose
    masks are taken where they roam. `save_vae` writes the autoencoder into a folder.
    `null_context` [L, D] is the text that stands for none, of a network of texts. Raises
    ConfigError for a network that the pipeline's code does not compute, CheckpointError if the
    folder cannot be written.
    """
    check_pipeline(network)
    assert isinstance(network, DiT)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as directory:
            made = Path(directory) / folder.name
            _write_transformer(
                network, made / "transformer", len(settings.betas), mask_step, header, null_context
            )
            _write_scheduler(network, made / "scheduler", settings)
            if save_vae:
                save_vae(made / "vae")
            _write_index(made, settings, has_vae=save_vae is not None)
            readme = made / "README.md"
            readme.write_text(card, encoding="utf-8")
            for path in made.rglob("*.*"):
                path.chmod(readme.stat().st_mode)  # safetensors' is for their owner alone
            made.replace(folder)  # which may be there, but empty
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written: {error.strerror}; choose another place"
        ) from None


def check_pipeline(network: Denoiser) -> None:
    """Raise ConfigError for a network that the pipeline's code does not compute."""
    if not isinstance(network, DiT):
        raise ConfigError(
            f"a network of {type(network).__name__} has no pipeline; accepted: a DiT; others leave "
            "as safetensors"
        )


def _write_transformer(
    network: DiT,
    folder: Path,
    num_timesteps: int,
    mask_step: int,
    header: Mapping[str, str] | None,
    null_context: Tensor | None,
) -> None:
    weights = {n: v for n, v in network.state_dict().items() if not n.startswith("routing.")}
    masks = _masks(network, num_timesteps, mask_step)
    if masks is not None:
        weights["masks"] = masks
    weights["pos_embed"] = network.pos_embed
    context: tuple[int, ...] | tuple[None, None] = (None, None)
    if network.conditioning == "text":
        assert null_context is not None
        weights["null_context"] = null_context.float()
        context = tuple(null_context.shape)
    ((num_heads, _),) = network.attention_shapes()
    config = {
        "hidden_size": network.hidden_size,
        "depth": len(network.blocks),
        "num_heads": num_heads,
        "patch_size": network.patch_size,
        "sample_size": network.input_size,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "num_classes": network.num_classes,
        "has_null_label": network.class_dropout_prob > 0,
        "num_timesteps": num_timesteps,
        "num_masks": 0 if masks is None else len(masks),
        "context_length": context[0],
        "context_dim": context[1],
    }
    folder.mkdir(parents=True)
    layout = {"layout": "dtr_transformer.py, for diffusers", **(header or {})}
    write_safetensors(weights, folder / "diffusion_pytorch_model.safetensors", layout)
    _write_component(folder, "dtr_transformer", "DTRTransformer2DModel", "config.json", config)


def _masks(network: DiT, num_timesteps: int, step: int) -> Tensor | None:
    """Return the masks of all timesteps, bool [depth, T, D], or [1, T, D] where blocks share them.

    None without routing.
    """
    found = network.routing(torch.arange(num_timesteps), step)
    masks = [mask for mask in found if mask is not None]
    if not masks:
        return None
    if all(torch.equal(mask, masks[0]) for mask in masks):
        masks = masks[:1]
    return torch.stack(masks)


def _write_scheduler(network: DiT, folder: Path, settings: PipelineSettings) -> None:
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


def _write_index(folder: Path, settings: PipelineSettings, *, has_vae: bool) -> None:
    index = {
        "transformer": ["dtr_transformer", "DTRTransformer2DModel"],
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
