"""Build the network that a `model` section describes, from anywhere outside this package."""

from collections.abc import Mapping
from typing import Any

from dtr_scale.config.load import validate_model
from dtr_scale.errors import ConfigError
from dtr_scale.models.build import build_network
from dtr_scale.models.denoiser import Denoiser


def build_model(section: Mapping[str, Any], num_timesteps: int = 1000) -> Denoiser:
    """Return the network that `section` describes, with fresh weights on the default device.

    Keys are those of `model` in an experiment file; None counts as absent. Without `num_classes`
    an ADM is unconditional, as guided-diffusion means it. Attention is resolved for the CUDA device
    if there is one; a network on the meta device gets "sdpa". Raises ConfigError for an unknown,
    missing or impossible setting.
    """
    settings = {key: value for key, value in section.items() if value is not None}
    if "num_classes" not in settings:
        if settings.get("type") == "adm":
            settings.setdefault("conditioning", "none")
        elif settings.get("conditioning", "class") == "class":
            raise ConfigError(
                "model.num_classes is missing; give the number of classes, or "
                "model.conditioning = 'none'"
            )
    model = validate_model(settings, source="the network")
    return build_network(**model.model_dump(), num_timesteps=num_timesteps)
