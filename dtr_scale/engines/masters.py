"""Keep fp32 masters beside the bf16 weights of a network, for what trains them as they are."""

from functools import partial

import torch
from torch import Tensor, nn


class Masters(nn.Module):
    """A network as a module whose parameters are fp32 masters of the network's bf16 weights.

    A call is the network's. Gradients are added to the masters' in fp32 as the backward goes on,
    so micro-steps are as well.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self._call = network.to(device).__call__  # no submodule: its weights are none of these
        self._pairs: list[tuple[Tensor, nn.Parameter]] = []
        for name, weight in network.named_parameters():
            master = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
            self.register_parameter(name.replace(".", "/"), master)
            weight.data = master.detach().bfloat16()
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(partial(_collect, master))
            self._pairs.append((weight, master))

    def named_masters(self) -> dict[str, nn.Parameter]:
        """Return the masters by the names of the network's parameters."""
        return {name.replace("/", "."): master for name, master in self.named_parameters()}

    def forward(self, *args: Tensor | int) -> Tensor:
        return self._call(*args)

    @torch.no_grad()
    def push(self) -> None:
        """Cast the masters: the network computes with them from here on."""
        # Private in torch. A loop of `copy_` does the same, with a launch per tensor.
        foreach_copy_ = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
        weights, masters = zip(*self._pairs, strict=True)
        foreach_copy_([weight.detach() for weight in weights], list(masters))


def _collect(master: nn.Parameter, weight: Tensor) -> None:
    """Add a weight's gradient to its master's, and free it."""
    assert weight.grad is not None
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad += weight.grad
    weight.grad = None
