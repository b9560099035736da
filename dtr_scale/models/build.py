"""Build a network by the name of its type."""

from collections.abc import Mapping
from typing import Any

import torch

from dtr_scale.models.attention import resolve_backend
from dtr_scale.models.denoiser import Denoiser
from dtr_scale.models.dit import VARIANTS, DiT
from dtr_scale.models.experts import MultiExperts
from dtr_scale.models.routing import RoutingSpec
from dtr_scale.models.unet import ADM

NETWORKS: dict[str, type[DiT] | type[ADM]] = {"dit": DiT, "adm": ADM}


def build_network(
    type: str,
    *,
    variant: str | None = None,
    routing: Mapping[str, Any] | None = None,
    attention: str = "auto",
    num_experts: int = 1,
    expert: int | None = None,
    num_timesteps: int = 1000,
    **keywords: Any,  # noqa: ANN401
) -> Denoiser:
    """Return a network of a type of NETWORKS, with fresh weights on the default device.

    `keywords` are those of its class; for a DiT `variant` gives its sizes. `routing` has the fields
    of `RoutingSpec`. `attention` is resolved for the CUDA device if there is one. With several
    experts the network is all of them, or the one that `expert` names. The arguments are those of
    a `model` section that has been validated: nothing is checked here.
    """
    if variant is not None:
        keywords |= VARIANTS[variant]._asdict()

    def build() -> DiT | ADM:
        network = NETWORKS[type](
            **keywords, routing=RoutingSpec(**(routing or {})), num_timesteps=num_timesteps
        )
        network.use_attention(_attention_backend(attention, network))
        return network

    # An expert alone is a plain network: its parameters have no `experts.<k>.` before their names.
    if num_experts == 1 or expert is not None:
        return build()
    return MultiExperts([build() for _ in range(num_experts)], num_timesteps)


def _attention_backend(name: str, network: Denoiser) -> str:
    device = torch.get_default_device()
    if device.type == "meta":  # nothing is computed there, whatever this machine has
        return "sdpa"
    # Weights are made on the CPU; the engine moves them to the GPU, where attention will run.
    if torch.cuda.is_available():
        device = torch.device("cuda")
    return resolve_backend(name, device, network.attention_shapes())
