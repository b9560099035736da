"""Train in one process on one device with fp32 weights; bf16 by autocast."""

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
    """The reference that all other engines are compared with."""

    def __init__(
        self,
        network: nn.Module,
        *,
        device: torch.device,
        grad_clip: float | None = None,
        precision: str = "fp32",
        **adam: Unpack[AdamSettings],
    ) -> None:
        # Before the optimizer and the pieces, which hold on to the tensors that they are given.
        self.network = network.to(device)
        self._parameters = list(network.parameters())
        exempt = undecayed(network, adam)
        self._adam = build_optimizer(network.named_parameters(), exempt, adam)
        self._grad_clip = grad_clip
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
        self._pieces: dict[str, Piece] = {}
        for name, parameter in network.named_parameters():
            self._pieces |= whole_pieces(name, parameter, adam_state(self._adam, parameter))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, step: int) -> Tensor:
        with self._autocast:
            return self.network(x_t, t, y, step).float()

    def backward(self, loss: Tensor) -> None:
        # Outside autocast: each gradient is computed in the dtype of its forward.
        loss.backward()

    def _update(self, judge: Judge | None) -> Tensor:
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if self._grad_clip:
            nn.utils.clip_grads_with_norm_(self._parameters, self._grad_clip, norm)
        self._heed(judge, norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def push_masters(self) -> None:
        pass  # the masters are the weights
