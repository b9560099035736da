"""Make a network from the `model` section of an experiment."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dtr_scale.errors import ConfigError
from dtr_scale.models.attention import resolve_backend
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.dit import VARIANTS, DiT, DiTSize
from dtr_scale.models.experts import MultiExperts
from dtr_scale.models.routing import Routing
from dtr_scale.models.unet import ADM

NETWORKS: dict[str, type[DiT] | type[ADM]] = {"dit": DiT, "adm": ADM}

_ALL_TYPES = {"type", "attention", "num_experts", "expert"}
_COUNTS = {
    *DiTSize._fields, "input_size", "image_size", "in_channels", "num_classes", "num_experts",
    "model_channels", "num_res_blocks", "context_length", "context_dim",
}  # fmt: skip
_GIVEN = {"self", "num_timesteps", "num_channels", "attention_backend"}


def build_model(config: Mapping[str, Any], num_timesteps: int = 1000) -> Denoiser:
    """Return the network that `config` describes, with fresh weights on the default device.

    Keys: type ("dit" or "adm"), the keywords of the network's class, attention, num_experts and
    expert; for a DiT, variant may stand for its four sizes. None counts as absent. Attention is
    resolved for the CUDA device if there is one; a network on the meta device gets "sdpa". Raises
    ConfigError for an unknown, missing or impossible setting.
    """
    settings = {key: value for key, value in config.items() if value is not None}
    network = NETWORKS.get(_required(settings, "type"))
    if network is None:
        accepted = ", ".join(NETWORKS)
        raise ConfigError(f"model.type: {settings['type']!r} is no network; accepted: {accepted}")
    accepted = _keywords(network)
    _check_keys("model", config, accepted | _ALL_TYPES | ({"variant"} if network is DiT else set()))
    routing = settings.get("routing", {"type": "none"})
    if not isinstance(routing, Mapping):
        raise ConfigError(f'model.routing: {routing!r} is no section; give {{"type": ...}}')
    _required(routing, "type", section="model.routing")
    _check_keys("model.routing", routing, _keywords(Routing))
    if network is ADM and "num_classes" not in settings:
        settings.setdefault("conditioning", "none")  # as guided-diffusion means it
    if settings.get("conditioning", "class") == "class":
        _required(settings, "num_classes")
    if network is DiT:
        settings |= _size(settings)._asdict()
    for key, parameter in inspect.signature(network.__init__).parameters.items():
        if key in accepted and parameter.default is inspect.Parameter.empty:
            _required(settings, key)
    _check_ranges(settings)
    keywords = {key: value for key, value in settings.items() if key in accepted}
    keywords["attention_backend"] = _attention_backend(settings.get("attention", "auto"))
    num_experts = settings.get("num_experts", 1)
    if num_experts == 1 or settings.get("expert") is not None:
        return network(**keywords, num_timesteps=num_timesteps)
    experts = [network(**keywords, num_timesteps=num_timesteps) for _ in range(num_experts)]
    return MultiExperts(experts, num_timesteps)


def _check_ranges(settings: Mapping[str, Any]) -> None:
    """Refuse numbers that no network has; what fits together, the networks check themselves."""
    for key, value in settings.items():
        if key in _COUNTS and not (isinstance(value, int) and value >= 1):
            raise ConfigError(f"model.{key}: {value!r} is not accepted; give a whole number from 1")
    dropout = settings.get("class_dropout_prob", 0.0)
    if not 0 <= dropout <= 1:
        raise ConfigError(f"model.class_dropout_prob: {dropout} is not accepted; give 0 to 1")
    expert, num_experts = settings.get("expert"), settings.get("num_experts", 1)
    if expert is not None and expert not in range(num_experts):
        raise ConfigError(
            f"model.expert: {expert} is none of model.num_experts = {num_experts}; "
            f"give 0 to {num_experts - 1}"
        )


def _size(settings: Mapping[str, Any]) -> DiTSize:
    own = [key for key in DiTSize._fields if key in settings]
    variant = settings.get("variant")
    if variant is None:
        return DiTSize(*(_required(settings, key) for key in DiTSize._fields))
    if own:
        raise ConfigError(
            f"model.variant: {variant!r} already sets {', '.join(own)}; remove one or the other"
        )
    if variant not in VARIANTS:
        raise ConfigError(
            f"model.variant: {variant!r} is not a variant{_suggestion(variant, VARIANTS)}; "
            f"accepted: {', '.join(VARIANTS)}"
        )
    return VARIANTS[variant]


def _attention_backend(name: str) -> str:
    device = torch.get_default_device()
    if device.type == "meta":
        return "sdpa"
    return resolve_backend(name, torch.device("cuda" if torch.cuda.is_available() else device))


def _keywords(made: type) -> set[str]:
    return set(inspect.signature(made.__init__).parameters) - _GIVEN


def _check_keys(section: str, settings: Mapping[str, Any], accepted: set[str]) -> None:
    for key in sorted(settings.keys() - accepted):
        raise ConfigError(f"unknown key {section}.{key}{_suggestion(key, accepted)}")


def _required(settings: Mapping[str, Any], key: str, section: str = "model") -> Any:  # noqa: ANN401
    if settings.get(key) is None:
        raise ConfigError(f"missing key {section}.{key}")
    return settings[key]


def _suggestion(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(words), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
