"""Write our weights in the layouts of others: official DiT and DTR, and diffusers."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtr_scale.checkpoint.convert import MASK
from dtr_scale.checkpoint.weights import write_safetensors, written_whole
from dtr_scale.errors import ConfigError
from dtr_scale.models.dit import VARIANTS
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
    _check_layout(config, "the official layout")
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


def export_diffusers(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    folder: Path,
    header: Mapping[str, str] | None = None,
) -> None:
    """Write our weights as a folder for diffusers' `DiTTransformer2DModel.from_pretrained`.

    `config` is the network's `model` section. The README.md written with them says how to mend
    diffusers' timestep frequencies, which are not DiT's. Raises ConfigError for what that class
    cannot hold: routing, text, experts, U-Nets, networks without a null label; CheckpointError if
    the folder cannot be written. config.json comes last: without it the folder does not load.
    """
    _check_layout(config, "diffusers' DiT")
    settings = {"in_channels": 4, "learn_sigma": True, "class_dropout_prob": 0.1, **config}
    if variant := config.get("variant"):
        settings |= VARIANTS[variant]._asdict()
    routing = (config.get("routing") or {"type": "none"})["type"]
    if routing != "none":
        raise ConfigError(
            f"model.routing.type: {routing!r} cannot be converted, diffusers' DiT has no masks; "
            "convert to safetensors"
        )
    if config.get("conditioning") == "none" or not settings["class_dropout_prob"] > 0:
        raise ConfigError(
            "model.class_dropout_prob: 0 cannot be converted, diffusers' DiT has a null label; "
            "convert to safetensors"
        )
    described = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": settings["num_heads"],
        "attention_head_dim": settings["hidden_size"] // settings["num_heads"],
        "in_channels": settings["in_channels"],
        "out_channels": settings["in_channels"] * (2 if settings["learn_sigma"] else 1),
        "num_layers": settings["depth"],
        "sample_size": settings["input_size"],
        "patch_size": settings["patch_size"],
        # diffusers adds the row of the null label by itself.
        "num_embeds_ada_norm": len(state_dict["y_embedder.embedding_table.weight"]) - 1,
        "norm_eps": 1e-6,
    }
    weights = dict(_diffusers_weights(state_dict, settings["depth"]))
    write_safetensors(weights, folder / "diffusion_pytorch_model.safetensors", header)
    for name, text in ("README.md", _DIFFUSERS_README), ("config.json", json.dumps(described)):
        with written_whole(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


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


def _check_layout(config: Mapping[str, Any], target: str) -> None:
    if obstacle := _layout_obstacle(config):
        raise ConfigError(
            f"{obstacle}, which {target} cannot hold; accepted: class-conditional DiTs"
        )


def _diffusers_weights(
    state_dict: Mapping[str, Tensor], depth: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights under the names of diffusers; each block has the embedders for itself."""
    renamed = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for i in range(depth):
        theirs = f"transformer_blocks.{i}"
        renamed |= {
            f"blocks.{i}.adaLN_modulation.1": f"{theirs}.norm1.linear",
            f"blocks.{i}.attn.proj": f"{theirs}.attn1.to_out.0",
            f"blocks.{i}.mlp.fc1": f"{theirs}.ff.net.0.proj",
            f"blocks.{i}.mlp.fc2": f"{theirs}.ff.net.2",
        }
    for ours, theirs in renamed.items():
        for kind in ("weight", "bias"):
            yield f"{theirs}.{kind}", state_dict[f"{ours}.{kind}"]
    for i in range(depth):
        embedders = f"transformer_blocks.{i}.norm1.emb"
        # Clones: safetensors holds no tensor twice.
        table = state_dict["y_embedder.embedding_table.weight"].clone()
        yield f"{embedders}.class_embedder.embedding_table.weight", table
        for kind in ("weight", "bias"):
            for ours, theirs in (("mlp.0", "linear_1"), ("mlp.2", "linear_2")):
                value = state_dict[f"t_embedder.{ours}.{kind}"]
                yield f"{embedders}.timestep_embedder.{theirs}.{kind}", value.clone()
            # [3 D, D] and [3 D]: queries, keys and values one after the other.
            thirds = state_dict[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for theirs, third in zip(("to_q", "to_k", "to_v"), thirds, strict=True):
                yield f"transformer_blocks.{i}.attn1.{theirs}.{kind}", third


_DIFFUSERS_README = """\
# DiT for diffusers

Written by dtr-scale. The frequencies of diffusers' timestep embedding are 10000^(-i/127), DiT was
trained with 10000^(-i/128). Set them right after loading:

```python
from diffusers import DiTTransformer2DModel

model = DiTTransformer2DModel.from_pretrained("THIS FOLDER")
for block in model.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
```

Without the loop the network sees timesteps that it was not trained on and its samples are worse.
"""
