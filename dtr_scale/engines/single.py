"""Train in one process on one device, with fp32 masters; bf16 by autocast or by bf16 weights."""

from typing import Unpack

import torch
from torch import Tensor, nn

from dtr_scale.engines.base import (
    AdamSettings,
    Engine,
    Judge,
    Piece,
    adam_state,
    build_optimizer,
    undecayed,
    whole_pieces,
)


class SingleEngine(Engine):
    """The reference that all other engines are compared with.

    `casts_weights` says how bf16 is computed. Autocast casts each weight in every forward, on a GPU
    a kernel apiece. Otherwise the network holds bf16 weights, cast from the masters once a step, as
    under ZeRO and FSDP2.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        device: torch.device,
        grad_clip: float | None = None,
        precision: str = "fp32",
        casts_weights: bool = False,
        **adam: Unpack[AdamSettings],
    ) -> None:
        # Before the optimizer and the pieces, which hold on to the tensors that they are given.
        self.network = network.to(device)
        self._masters = list(network.parameters())
        self._weights: list[Tensor] = [*self._masters]
        self._casts_weights = casts_weights and precision == "bf16"
        if self._casts_weights:
            self._masters = [
                nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                for weight in self._weights
            ]
            network.to(torch.bfloat16)
        names = [name for name, _ in network.named_parameters()]
        named = zip(names, self._masters, strict=True)
        self._adam = build_optimizer(named, undecayed(network, adam), adam)
        self._grad_clip = grad_clip
        autocasts = precision == "bf16" and not self._casts_weights
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=autocasts)
        self._pieces: dict[str, Piece] = {}
        for name, master in zip(names, self._masters, strict=True):
            self._pieces |= whole_pieces(name, master, adam_state(self._adam, master))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, step: int) -> Tensor:
        with self._autocast:
            return self.network(x_t, t, y, step).float()

    def backward(self, loss: Tensor) -> None:
        # Outside autocast: each gradient is computed in the dtype of its forward.
        loss.backward()
        if self._casts_weights:
            self._collect_gradients()

    def step(self, judge: Judge | None = None) -> Tensor:
        norm = nn.utils.get_total_norm([m.grad for m in self._masters if m.grad is not None])
        if self._grad_clip:
            nn.utils.clip_grads_with_norm_(self._masters, self._grad_clip, norm)
        self._heed(judge, norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.push_masters()
        return norm

    @torch.no_grad()
    def push_masters(self) -> None:
        """Cast the masters, where they are not the weights themselves."""
        if self._casts_weights:
            # Private in torch. A loop of `copy_` does the same, with a launch per tensor.
            foreach_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            foreach_copy_(self._weights, [*self._masters])

    @torch.no_grad()
    def _collect_gradients(self) -> None:
        """Add the weights' gradients to the masters', in fp32 as micro-steps are added."""
        for weight, master in zip(self._weights, self._masters, strict=True):
            if weight.grad is None:
                continue
            if master.grad is None:
                master.grad = weight.grad.float()
            else:
                master.grad += weight.grad
            weight.grad = None
