"""Write our weights in the layout of the official DiT and DTR."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtr_scale.checkpoint.convert import MASK
from dtr_scale.checkpoint.weights import write_safetensors
from dtr_scale.errors import ConfigError
from dtr_scale.models.embedders import sincos_position_table
from dtr_scale.models.routing import RoutingSpec, build_routing


def export_dit(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    path: Path,
    num_timesteps: int = 1000,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write our weights as safetensors in the layout of DiT, or of DTR for a routed network.

    `config` is the network's `model` section. Positions and masks are written too, as the official
    state dicts have them. Raises ConfigError for a network without such a layout, CheckpointError
    if `path` cannot be written; the file appears whole or not at all.
    """
    if obstacle := _layout_obstacle(config):
        raise ConfigError(
            f"{obstacle}, which the official layout cannot hold; accepted: class-conditional DiTs"
        )
    weights = {name: v for name, v in state_dict.items() if not name.startswith("routing.")}
    hidden_size, _, patch_size, _ = weights["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    positions = sincos_position_table(hidden_size, config["input_size"] // patch_size)
    weights["pos_embed"] = positions[None]
    spec = RoutingSpec(**(config.get("routing") or {}))
    routing = build_routing(spec, num_timesteps, [hidden_size] * depth)
    own = routing.state_dict()
    routing.load_state_dict({name: state_dict[f"routing.{name}"] for name in own})
    for block, mask in enumerate(routing(torch.arange(num_timesteps))):
        if mask is not None:
            weights[MASK.format(block)] = mask.float()
    write_safetensors(weights, path, header)


def _layout_obstacle(config: Mapping[str, Any]) -> str | None:
    """Return why a network has no official DiT layout, None if it has one."""
    if config["type"] != "dit":
        return f"model.type: {config['type']!r} is no DiT"
    if config.get("conditioning") == "text":
        return "model.conditioning: 'text' adds cross-attention"
    if config.get("qk_norm"):
        return "model.qk_norm: true adds norms of queries and keys"
    if config.get("num_experts", 1) > 1:
        return f"model.num_experts: {config['num_experts']} networks are not one"
    if (config.get("routing") or {"type": "none"})["type"] == "max_roaming":
        return "model.routing.type: 'max_roaming' has other masks at every training step"
    return None
