"""Train in one process on one device: fp32 weights, with bf16 autocast where asked for."""

import torch
from torch import Tensor, nn

from dtr_scale.engines.base import (
    Engine,
    Piece,
    adam_state,
    build_optimizer,
    whole_pieces,
)


class SingleEngine(Engine):
    """The reference that all other engines are compared with."""

    def __init__(
        self,
        network: nn.Module,
        *,
        device: torch.device,
        lr: float,
        weight_decay: float = 0.0,
        grad_clip: float | None = None,
        precision: str = "fp32",
    ) -> None:
        # Before the optimizer and the pieces, which hold on to the tensors that they are given.
        self.network = network.to(device)
        self._parameters = list(network.parameters())
        self._adam = build_optimizer(self._parameters, lr=lr, weight_decay=weight_decay)
        self._max_norm = grad_clip or float("inf")
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

    def step(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return norm

    def push_masters(self) -> None:
        """Nothing to do: the masters are the weights."""
