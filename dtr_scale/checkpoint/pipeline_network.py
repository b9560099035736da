"""Describe a network to the code that computes it in a pipeline for diffusers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtr_scale.errors import ConfigError
from dtr_scale.models.attention import HeadNorm
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.dit import DiT
from dtr_scale.models.experts import MultiExperts
from dtr_scale.models.unet import ADM

_OF_UNETS = (
    "model_channels", "num_res_blocks", "attention_resolutions", "channel_mult", "conv_resample",
    "num_heads", "num_head_channels", "use_scale_shift_norm", "resblock_updown",
    "use_new_attention_order",
)  # fmt: skip
"""Settings of a U-Net that go by the same name there."""


class PipelineNetwork(NamedTuple):
    """A network as its code in a pipeline takes it."""

    module: str
    class_name: str
    weights: dict[str, Tensor]
    config: dict[str, Any]


def check_pipeline(network: Denoiser) -> None:
    """Raise ConfigError for a network that no code of a pipeline computes."""
    if isinstance(network, DiT | ADM) or _experts_of(network):
        return
    raise ConfigError(
        f"a network of {type(network).__name__} has no pipeline; accepted: a DiT, experts that are "
        "DiTs, or an ADM; others leave as safetensors"
    )


def pipeline_network(
    network: Denoiser,
    section: Mapping[str, Any],
    *,
    num_timesteps: int,
    mask_step: int,
    null_context: Tensor | None,
) -> PipelineNetwork:
    """Return a network with all that its code needs: weights, masks of all timesteps, settings.

    `section` is its `model` section with all defaults. ConfigError as of `check_pipeline`.
    """
    check_pipeline(network)
    if experts := _experts_of(network):
        return _together(
            [
                pipeline_network(
                    expert,
                    section,
                    num_timesteps=num_timesteps,
                    mask_step=mask_step,
                    null_context=null_context,
                )
                for expert in experts
            ]
        )
    routing: Any = network.routing
    # [T, C] of each block, where it has one.
    found = [m for m in routing(torch.arange(num_timesteps), mask_step) if m is not None]
    weights = {n: v for n, v in network.state_dict().items() if not n.startswith("routing.")}
    config = {
        "sample_size": network.input_size,
        "in_channels": network.in_channels,
        "out_channels": network.out_channels,
        "num_classes": network.num_classes,
        "has_null_label": network.class_dropout_prob > 0,
        "num_timesteps": num_timesteps,
    }
    if isinstance(network, ADM):
        return _unet(network, section, weights, config, found)
    assert isinstance(network, DiT)
    return _transformer(network, weights, config, found, null_context)


def _experts_of(network: Denoiser) -> list[DiT]:
    """Return the experts of a network; [] where it has none, or others than DiTs."""
    experts = list(network.experts) if isinstance(network, MultiExperts) else []
    found = [expert for expert in experts if isinstance(expert, DiT)]
    return found if len(found) == len(experts) else []


def _together(experts: list[PipelineNetwork]) -> PipelineNetwork:
    """Return experts as one network. They share the null text, which it holds itself besides."""
    first = experts[0]
    weights = {
        f"experts.{number}.{name}": tensor
        for number, expert in enumerate(experts)
        for name, tensor in expert.weights.items()
    }
    if "null_context" in first.weights:
        weights["null_context"] = first.weights["null_context"].clone()
    return first._replace(weights=weights, config=first.config | {"num_experts": len(experts)})


def _transformer(
    network: DiT,
    weights: dict[str, Tensor],
    config: dict[str, Any],
    masks: list[Tensor],
    null_context: Tensor | None,
) -> PipelineNetwork:
    if masks and all(torch.equal(mask, masks[0]) for mask in masks):
        masks = masks[:1]  # all blocks share them
    if masks:
        weights["masks"] = torch.stack(masks)
    weights["pos_embed"] = network.pos_embed
    context: tuple[int, ...] | tuple[None, None] = (None, None)
    if network.conditioning == "text":
        assert null_context is not None
        weights["null_context"] = null_context.float().clone()  # experts have one each
        context = tuple(null_context.shape)
    ((num_heads, _),) = network.attention_shapes()
    block: Any = network.blocks[0]
    config |= {
        "hidden_size": network.hidden_size,
        "depth": len(network.blocks),
        "num_heads": num_heads,
        "patch_size": network.patch_size,
        "num_masks": len(masks),
        "context_length": context[0],
        "context_dim": context[1],
        "qk_norm": isinstance(block.attn.q_norm, HeadNorm),
        "num_experts": 1,
    }
    return PipelineNetwork("dtr_transformer", "DTRTransformer2DModel", weights, config)


def _unet(
    network: ADM,
    section: Mapping[str, Any],
    weights: dict[str, Tensor],
    config: dict[str, Any],
    masks: list[Tensor],
) -> PipelineNetwork:
    distinct: list[Tensor] = []
    mask_of: list[int] = []
    for mask in masks:
        same = (i for i, other in enumerate(distinct) if torch.equal(mask, other))
        number = next(same, len(distinct))
        if number == len(distinct):
            distinct.append(mask)
        mask_of.append(number)
    weights |= {f"masks_{number}": mask for number, mask in enumerate(distinct)}
    config |= {key: section[key] for key in _OF_UNETS}
    config |= {"has_classes": network.conditioning == "class", "mask_of": mask_of}
    return PipelineNetwork("dtr_unet", "DTRUNet2DModel", weights, config)
