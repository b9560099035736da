"""Make a network from the `model` section of an experiment."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dtr_scale.errors import ConfigError
from dtr_scale.models.attention import resolve_backend
from dtr_scale.models.dit import VARIANTS, DiT, DiTSize

_DEFAULTS = {
    "in_channels": 4,
    "conditioning": "class",
    "class_dropout_prob": 0.1,
    "learn_sigma": True,
    "attention": "auto",
    "routing": {"type": "none"},
}
_KEYS = {"type", "variant", *DiTSize._fields, "input_size", "num_classes", *_DEFAULTS}


def build_model(config: Mapping[str, Any], num_timesteps: int = 1000) -> DiT:
    """Return the network that `config` describes, with fresh weights on the default device.

    Keys: type ("dit"), variant or its four sizes (hidden_size, depth, num_heads, patch_size),
    input_size, num_classes, and those of `_DEFAULTS`. None counts as absent. Attention is resolved
    for the CUDA device if there is one; a network on the meta device gets "sdpa". Raises
    ConfigError for an unknown, missing or impossible setting.
    """
    _check_keys("model", config, _KEYS)
    settings = _DEFAULTS | {key: value for key, value in config.items() if value is not None}
    if _required(settings, "type") != "dit":
        raise ConfigError(f"model.type: {settings['type']!r} is not a network; accepted: dit")
    size, input_size = _size(settings), _required(settings, "input_size")
    _check_divisible("input_size", input_size, "patch_size", size.patch_size)
    num_classes, class_dropout_prob = _conditioning(settings)
    routing = settings["routing"]
    _check_keys("model.routing", routing, {"type", "alpha", "beta"})
    return DiT(
        **size._asdict(),
        input_size=input_size,
        in_channels=settings["in_channels"],
        num_classes=num_classes,
        class_dropout_prob=class_dropout_prob,
        learn_sigma=settings["learn_sigma"],
        routing=_required(routing, "type", section="model.routing"),
        alpha=routing.get("alpha", 4.0),
        beta=routing.get("beta", 0.8),
        num_timesteps=num_timesteps,
        attention_backend=_attention_backend(settings["attention"]),
    )


def _size(settings: Mapping[str, Any]) -> DiTSize:
    own = [key for key in DiTSize._fields if key in settings]
    variant = settings.get("variant")
    if variant is None:
        size = DiTSize(*(_required(settings, key) for key in DiTSize._fields))
        _check_divisible("hidden_size", size.hidden_size, "num_heads", size.num_heads)
        if size.hidden_size % 4:
            raise ConfigError(
                f"model.hidden_size: {size.hidden_size} is not a multiple of 4, "
                "which the sine and cosine positions need"
            )
        return size
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


def _conditioning(settings: Mapping[str, Any]) -> tuple[int, float]:
    """Return num_classes and class_dropout_prob."""
    if settings["conditioning"] == "none":
        return 1, 0.0
    if settings["conditioning"] != "class":
        raise ConfigError(
            f"model.conditioning: {settings['conditioning']!r} is not accepted; "
            "give 'class' or 'none'"
        )
    return _required(settings, "num_classes"), settings["class_dropout_prob"]


def _attention_backend(name: str) -> str:
    device = torch.get_default_device()
    if device.type == "meta":
        return "sdpa"
    return resolve_backend(name, torch.device("cuda" if torch.cuda.is_available() else device))


def _check_divisible(key: str, value: int, by_key: str, by: int) -> None:
    if value % by:
        raise ConfigError(f"model.{key}: {value} is not a multiple of model.{by_key} = {by}")


def _check_keys(section: str, settings: Mapping[str, Any], accepted: set[str]) -> None:
    for key in sorted(settings.keys() - accepted):
        raise ConfigError(f"unknown key {section}.{key}{_suggestion(key, accepted)}")


def _required(settings: Mapping[str, Any], key: str, section: str = "model") -> Any:  # noqa: ANN401
    if settings.get(key) is None:
        raise ConfigError(f"missing key {section}.{key}")
    return settings[key]


def _suggestion(word: str, words: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, sorted(words), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""
